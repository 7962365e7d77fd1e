#!/usr/bin/env bash
# Node 0 of 1 of llama_tiny-dct_adamw-0123456789ab, for host localhost.
# Exit codes: docs/faults.md. After 75, 1 or 76 the same scripts continue the run.
set -euo pipefail
cd /data/me/proj
export OMP_NUM_THREADS=1
export PYTHONUNBUFFERED=1
export GLOO_SOCKET_IFNAME=lo
export DS_ACCELERATOR=cpu
exec /data/me/venv/bin/python -m dist_lowrank.torchrun \
    --nproc-per-node 2 \
    --nnodes 1 \
    --max-restarts 0 \
    --signals-to-handle SIGTERM,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 120 \
    -m dist_lowrank.worker runs/llama_tiny-dct_adamw-0123456789ab --of-attempt 1
