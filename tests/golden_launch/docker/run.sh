#!/usr/bin/env bash
# llama_tiny-dct_adamw-0123456789ab in one container.
# Exit codes: docs/faults.md. After 75, 1 or 76 the same script continues the run.
set -euo pipefail
: "${HF_TOKEN:?is not set here; no file holds it}"
exec docker run --rm --name llama-tiny-dct-adamw-0123456789ab \
    --user 1000:1000 --cap-drop ALL --security-opt no-new-privileges \
    --shm-size 8g --tmpfs /tmp:exec,mode=1777 \
    --network bridge --stop-timeout 130 \
    --workdir /workspace \
    --read-only \
    --ulimit memlock=-1:-1 --ulimit stack=67108864 \
    --device /dev/infiniband --cap-add IPC_LOCK \
    --gpus 2 \
    --volume /data/me/proj/runs:/runs \
    --volume /data/me/proj/books:/workspace/books:ro \
    --volume /data/me/proj/more:/data:ro \
    --env HOME=/tmp \
    --env USER=trainer \
    --env XDG_CACHE_HOME=/runs/.cache \
    --env HF_HOME=/runs/.cache/huggingface \
    --env TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    --env TRITON_CACHE_DIR=/tmp/triton \
    --env HF_HUB_OFFLINE=1 \
    --env OMP_NUM_THREADS=1 \
    --env PYTHONUNBUFFERED=1 \
    --env GLOO_SOCKET_IFNAME=lo \
    --env NCCL_SOCKET_IFNAME=lo \
    --env NCCL_DEBUG=WARN \
    --env PYTORCH_ALLOC_CONF=expandable_segments:True \
    --env TORCH_FR_BUFFER_SIZE=2000 \
    --env TORCH_FR_DUMP_TEMP_FILE=/runs/llama_tiny-dct_adamw-0123456789ab/flight_recorder/rank_ \
    --env TORCH_NCCL_DUMP_ON_TIMEOUT=1 \
    --env HF_TOKEN \
    dist-lowrank:cpu \
    python -m dist_lowrank.torchrun \
    --nproc-per-node 2 \
    --nnodes 1 \
    --max-restarts 0 \
    --signals-to-handle SIGTERM,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 120 \
    -m dist_lowrank.worker /runs/llama_tiny-dct_adamw-0123456789ab --of-attempt 1
