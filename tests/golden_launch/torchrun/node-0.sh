#!/usr/bin/env bash
# Node 0 of 2 of llama_tiny-dct_adamw-0123456789ab, for host node0. Start the scripts of all hosts, in any order.
# Exit codes: docs/faults.md. After 75, 1 or 76 the same scripts continue the run.
set -euo pipefail
cd /data/me/proj
export OMP_NUM_THREADS=1
export PYTHONUNBUFFERED=1
export GLOO_SOCKET_IFNAME=eth0
export NCCL_SOCKET_IFNAME=eth0
export NCCL_DEBUG=WARN
export PYTORCH_ALLOC_CONF=expandable_segments:True
export TORCH_FR_BUFFER_SIZE=2000
export TORCH_FR_DUMP_TEMP_FILE=runs/llama_tiny-dct_adamw-0123456789ab/flight_recorder/rank_
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
exec /data/me/venv/bin/python -m dist_lowrank.torchrun \
    --nproc-per-node 8 \
    --nnodes 2 --node-rank 0 --master-addr node0 --master-port 28126 \
    --rdzv-backend static --rdzv-id llama-tiny-dct-adamw-0123456789ab --rdzv-conf timeout=600 \
    --max-restarts 0 \
    --signals-to-handle SIGTERM,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 120 \
    -m dist_lowrank.worker runs/llama_tiny-dct_adamw-0123456789ab --of-attempt 1
