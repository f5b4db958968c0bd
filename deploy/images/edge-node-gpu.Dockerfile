# Edge node for NVIDIA GPUs; the CUDA libraries come with the pinned wheels, the driver from the host's runtime.
# Build from the repository root: docker build -f deploy/images/edge-node-gpu.Dockerfile -t lorikeet/edge-node-gpu:0.1.0 .
FROM python:3.11.13-slim-bookworm AS build
WORKDIR /src
COPY requirements/gpu.lock requirements/gpu.lock
RUN python -m venv /opt/lorikeet \
 && /opt/lorikeet/bin/pip install --no-cache-dir --no-deps -r requirements/gpu.lock
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY edge_node edge_node
COPY central central
RUN /opt/lorikeet/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11.13-slim-bookworm
# Triton compiles a small launcher with a C compiler at run time; it needs Python.h, which this base image has.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libnuma1 \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 lorikeet \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin lorikeet \
 && install -d -o lorikeet -g lorikeet /data
COPY --from=build /opt/lorikeet /opt/lorikeet
ENV PATH=/opt/lorikeet/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    VLLM_DO_NOT_TRACK=1 \
    EDGE_DATA_DIR=/data \
    EDGE_SERVING__HOST=0.0.0.0
USER 10001:10001
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
CMD ["edge-node", "serve"]
