#!/bin/sh
# Runs the arguments, in place of this shell: signals reach them, and their exit code is the container's.
set -eu
if [ ! -w /tmp ]; then
    echo "error: /tmp is not writable; give a container with a read-only root one: --tmpfs /tmp" >&2
    exit 2
fi
exec "$@"
