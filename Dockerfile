# Two images, `docker build --target cpu .` and `docker build --target cuda .`; docs/docker.md says how to run them.
# The digest is of the multi-architecture index. Both targets stand on plain Python: torch's wheels bring CUDA along,
# and the driver comes from the host.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

# ---- builder: a virtual environment that is copied later. A private mirror comes as secrets that no layer keeps:
# `--secret id=pip_conf,src=pip.conf --secret id=ca_bundle,src=ca.pem`, with `cert = /run/secrets/ca_bundle` in pip.conf.
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_CACHE_DIR=/cache/build/pip
WORKDIR /build
# Without pip of its own: the base's pip installs into it, and the image needs none.
RUN python3 -m venv --without-pip /opt/venv

# What pyproject.toml declares, apart, so that its other lines may change without a new layer of dependencies.
FROM builder AS requirements
COPY pyproject.toml docker/requirements.py ./
RUN python3 requirements.py train deepspeed report >requirements.txt

# ---- runtime: no compiler, no package cache, nothing of the build
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS runtime
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log \
    && useradd --uid 1000 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin trainer \
    && install -d -o trainer -g trainer /runs /data \
    && install -d /workspace \
    && ln -s /runs /workspace/runs
# What is written outside of /runs and /data goes to /tmp, the one place that a read-only root leaves (`--tmpfs /tmp`).
# LOGNAME: torch asks for the user's name, which an id given by --user may not have.
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin \
    HOME=/tmp \
    LOGNAME=trainer \
    XDG_CACHE_HOME=/tmp/cache \
    HF_HOME=/tmp/cache/huggingface \
    MPLCONFIGDIR=/tmp/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/torchinductor \
    TORCH_EXTENSIONS_DIR=/tmp/cache/torch_extensions \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /workspace
COPY --chmod=755 docker/entrypoint.sh /usr/local/bin/entrypoint.sh
COPY launch launch
ENTRYPOINT ["/usr/bin/tini", "--", "/usr/local/bin/entrypoint.sh"]
CMD ["dist-lowrank", "train"]
HEALTHCHECK --interval=5m --timeout=1m --start-period=1m --retries=2 CMD ["dist-lowrank", "doctor", "--quick"]
LABEL org.opencontainers.image.title="dist-lowrank" \
    org.opencontainers.image.description="Distributed pre-training with low-rank optimizer state" \
    org.opencontainers.image.licenses="Apache-2.0"

# ---- what it depends on, in one layer that a change of code leaves alone. torch's own tests and headers stay behind:
# without a compiler nobody needs them.
FROM builder AS dependencies-cpu
COPY --from=requirements /build/requirements.txt ./
COPY constraints.txt ./
# Where the CPU build of torch is. Empty: the index or the folder of pip.conf has it.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# pip's cache is mounted, and in no layer.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/cache/build/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle \
    sed 's/^torch==.*/&+cpu/' constraints.txt >constraints-cpu.txt \
    && DS_BUILD_OPS=0 pip --python /opt/venv/bin/python install -c constraints-cpu.txt -r requirements.txt \
    ${TORCH_CPU_INDEX:+--extra-index-url "${TORCH_CPU_INDEX}"} \
    && rm -rf /opt/venv/lib/python3*/site-packages/torch/include \
    /opt/venv/lib/python3*/site-packages/torch/test /opt/venv/lib/python3*/site-packages/torch/bin/test_*

# ---- the project itself
FROM builder AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY dist_lowrank dist_lowrank
RUN --mount=type=cache,target=/cache/build/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle \
    pip wheel --no-deps --wheel-dir /wheel .

# ---- laptops, tests and clusters without GPUs: gloo
FROM runtime AS cpu
COPY --from=dependencies-cpu /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip --python /opt/venv/bin/python install --no-deps --no-index --no-cache-dir /wheel/*.whl
ARG GIT_REVISION=unknown
LABEL org.opencontainers.image.revision="${GIT_REVISION}"
USER 1000:1000

FROM builder AS dependencies-cuda
COPY --from=requirements /build/requirements.txt ./
COPY constraints.txt ./
# pip's cache is mounted, and in no layer.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/cache/build/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle \
    DS_BUILD_OPS=0 pip --python /opt/venv/bin/python install -c constraints.txt -r requirements.txt \
    && rm -rf /opt/venv/lib/python3*/site-packages/torch/include \
    /opt/venv/lib/python3*/site-packages/torch/test /opt/venv/lib/python3*/site-packages/torch/bin/test_*

# ---- NVIDIA GPUs: NCCL, with the libraries that it needs to find InfiniBand
FROM runtime AS cuda
RUN apt-get update \
    && apt-get install -y --no-install-recommends ibverbs-providers libibverbs1 librdmacm1 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=dependencies-cuda /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip --python /opt/venv/bin/python install --no-deps --no-index --no-cache-dir /wheel/*.whl
ARG GIT_REVISION=unknown
LABEL org.opencontainers.image.revision="${GIT_REVISION}"
USER 1000:1000
