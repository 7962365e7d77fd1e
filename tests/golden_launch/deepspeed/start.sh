#!/usr/bin/env bash
# llama_tiny-dct_adamw-0123456789ab on the hosts of the hostfile, from any of them. Or on each by itself, with --no_ssh --node_rank 0 (1, ...).
# Whether to start it again: attempt-N/stopped.json and FINISHED in the run's folder (docs/faults.md).
set -euo pipefail
exec deepspeed --hostfile /data/me/proj/runs/llama_tiny-dct_adamw-0123456789ab/attempt-1/launch/hostfile --num_gpus 1 \
    --launcher pdsh --master_addr node0 --master_port 28126 \
    --no_local_rank --no_python "$@" \
    bash /data/me/proj/runs/llama_tiny-dct_adamw-0123456789ab/attempt-1/launch/node.sh
