#!/usr/bin/env bash
# One node of llama_tiny-dct_adamw-0123456789ab. job.sbatch starts it on each, with MASTER_ADDR and MASTER_PORT.
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
: "${HF_TOKEN:?is not set here; no file holds it}"
exec /data/me/venv/bin/python -m dist_lowrank.torchrun \
    --nproc-per-node 8 \
    --nnodes 2 --node-rank "$SLURM_NODEID" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    --rdzv-backend static --rdzv-id llama-tiny-dct-adamw-0123456789ab --rdzv-conf timeout=600 \
    --max-restarts 0 \
    --signals-to-handle SIGTERM,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 120 \
    -m dist_lowrank.worker runs/llama_tiny-dct_adamw-0123456789ab --of-attempt 1
