#!/bin/bash
# Builds the Dockerfile and runs its images on a Debian machine without a Docker engine: buildah, podman and runc, as
# root. Everything lies in one folder, build/containers; nothing of the machine's own container storage is touched.
#
#   docker/without_engine.sh setup            installs the Debian packages that are missing, makes the base image
#   docker/without_engine.sh build cpu        builds a target as dist-lowrank:TARGET
#   docker/without_engine.sh run COMMAND...   a command on that storage: run podman images
#   docker/without_engine.sh remove           deletes all of it
#
# What pip's configuration on this machine says (index, folders of wheels, certificate) is used during the build, as
# secrets and mounts, and is in no image. CONTAINER_STORAGE: another folder than build/containers.
set -euo pipefail

project=$(cd "$(dirname "$0")/.." && pwd)
storage=$(realpath -m "${CONTAINER_STORAGE:-$project/build/containers}")
base_image=localhost/debian-python:bookworm
packages=(buildah podman runc conmon netavark aardvark-dns iptables uidmap mmdebstrap)

export CONTAINERS_STORAGE_CONF=$storage/storage.conf CONTAINERS_CONF=$storage/containers.conf
export TMPDIR=$storage/tmp # buildah keeps what `RUN --mount=type=cache` caches there

write_configuration() {
    mkdir -p "$TMPDIR"
    cat >"$CONTAINERS_STORAGE_CONF" <<-END
		[storage]
		driver = "overlay"
		graphroot = "$storage/graph"
		runroot = "$storage/run"
	END
    # Limits at or below this shell's own, for machines that may not raise them; runc and cgroupfs, because crun and
    # systemd's manager refuse cgroups of versions 1 and 2 side by side.
    cat >"$CONTAINERS_CONF" <<-END
		[containers]
		default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
		[engine]
		cgroup_manager = "cgroupfs"
		runtime = "runc"
		events_logger = "file"
		[network]
		network_backend = "netavark"
	END
}

setup() {
    local missing
    missing=$(dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' "${packages[@]}" 2>&1 | grep -vc '^ii ' || true)
    if [ "$missing" -gt 0 ]; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >"$TMPDIR/apt.log"
    fi
    if ! podman image exists "$base_image"; then # the same files as python:3.11-slim, but from Debian's mirror
        mmdebstrap --quiet --variant=minbase --include=python3,python3-pip,python3-venv,ca-certificates \
            bookworm "$TMPDIR/base.tar"
        podman import --quiet "$TMPDIR/base.tar" "$base_image"
        rm "$TMPDIR/base.tar"
    fi
}

# pip's settings for the build: a pip.conf on standard output, and the folders to mount in `mounts`.
mounts=()
pip_configuration() {
    local key name value place
    echo "[global]" >"$TMPDIR/pip.conf"
    echo "cert = /run/secrets/ca_bundle" >>"$TMPDIR/pip.conf"
    for key in index-url extra-index-url find-links; do
        name=PIP_${key^^}
        name=${name//-/_}
        value=${!name:-$(python3 -m pip config get "global.$key" 2>/dev/null || true)}
        [ -z "$value" ] || echo "$key = $value" >>"$TMPDIR/pip.conf"
        for place in $value; do
            case $place in
            file:///*) place=$(dirname "${place#file://}") ;; # an index links to files beside it
            /*) ;;
            *) continue ;;
            esac
            [ ! -d "$place" ] || mounts+=(--volume "$place:$place:ro")
        done
    done
}

build() {
    local target=$1 arguments=()
    pip_configuration
    # The CPU build of torch from pip's own configuration, if that has it.
    local torch
    torch=$(grep '^torch==' "$project/constraints.txt")
    if python3 -m pip download --quiet --no-deps --dest "$TMPDIR/torch" "$torch+cpu" 2>/dev/null; then
        arguments+=(--build-arg TORCH_CPU_INDEX=)
        rm -r "$TMPDIR/torch"
    fi
    podman build --pull=never --layers --format docker --target "$target" --tag "dist-lowrank:$target" \
        --build-arg BASE_IMAGE="$base_image" \
        --build-arg GIT_REVISION="$(git -C "$project" rev-parse HEAD 2>/dev/null || echo unknown)" \
        --secret id=pip_conf,src="$TMPDIR/pip.conf" \
        --secret id=ca_bundle,src="${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" \
        "${arguments[@]}" "${mounts[@]}" "$project"
}

case ${1:-} in
setup)
    write_configuration
    setup
    ;;
build)
    write_configuration
    setup
    build "${2:-cpu}"
    ;;
run)
    shift
    exec "$@"
    ;;
remove)
    podman system reset --force
    rm -rf "$storage"
    ;;
*)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
    ;;
esac
