#!/usr/bin/env bash
# Node 1 of 3 of llama_tiny-dct_adamw-0123456789ab, for host node1. Start the scripts of all hosts, in any order.
# Exit codes: docs/faults.md. After 75, 1 or 76 the same scripts continue the run.
set -euo pipefail
cd /data/me/proj
export OMP_NUM_THREADS=1
export PYTHONUNBUFFERED=1
export NCCL_SOCKET_IFNAME='^docker,lo,veth'
export NCCL_DEBUG=WARN
export PYTORCH_ALLOC_CONF=expandable_segments:True
export TORCH_FR_BUFFER_SIZE=2000
export TORCH_FR_DUMP_TEMP_FILE=runs/llama_tiny-dct_adamw-0123456789ab/flight_recorder/rank_
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
export NCCL_IB_HCA=mlx5
: "${HF_TOKEN:?is not set here; no file holds it}"
exec /data/me/venv/bin/python -m dist_lowrank.torchrun \
    --nproc-per-node 8 \
    --nnodes 2:3 --rdzv-backend c10d --rdzv-endpoint node0:29500 --rdzv-id llama-tiny-dct-adamw-0123456789ab \
    --rdzv-conf join_timeout=600,is_host=0 \
    --max-restarts 3 \
    --signals-to-handle SIGTERM,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 120 \
    -m dist_lowrank.worker runs/llama_tiny-dct_adamw-0123456789ab --of-attempt 1
