#!/usr/bin/env bash
# One node of llama_tiny-dct_adamw-0123456789ab. DeepSpeed's launcher starts it on each host, as one process, with RANK, MASTER_ADDR and
# MASTER_PORT. By hand: RANK=0 (1, 2, ...) MASTER_ADDR=(the first host) MASTER_PORT=(a port) bash node.sh
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
unset CUDA_VISIBLE_DEVICES  # DeepSpeed's launcher shows its one process one GPU
exec /data/me/venv/bin/python -m dist_lowrank.torchrun \
    --nproc-per-node 8 \
    --nnodes 2 --node-rank "$RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    --rdzv-backend static --rdzv-id llama-tiny-dct-adamw-0123456789ab --rdzv-conf timeout=600 \
    --max-restarts 0 \
    --signals-to-handle SIGTERM,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 120 \
    -m dist_lowrank.worker runs/llama_tiny-dct_adamw-0123456789ab --of-attempt 1
