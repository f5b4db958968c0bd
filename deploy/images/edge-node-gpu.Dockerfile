# Edge node for NVIDIA GPUs; the CUDA libraries come with the pinned wheels, the driver from the
# host's runtime. Build from the repository root: docker build -f
# deploy/images/edge-node-gpu.Dockerfile -t lorikeet/edge-node-gpu:0.1.0 .
FROM python:3.11.13-slim-bookworm AS dependencies
WORKDIR /src
COPY requirements/gpu.lock requirements/gpu.lock
RUN python -m venv /opt/lorikeet \
 && /opt/lorikeet/bin/pip install --no-cache-dir --no-deps -r requirements/gpu.lock

FROM dependencies AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY lorikeet lorikeet
COPY edge_node edge_node
COPY central central
RUN /opt/lorikeet/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels .

FROM python:3.11.13-slim-bookworm
# Triton compiles a small launcher with a C compiler at run time; it needs Python.h, which this base
# image has. tini is PID 1: it passes a signal on from the first moment, and reaps what a killed
# child leaves behind.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libnuma1 tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 lorikeet \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin lorikeet \
 && install -d -o lorikeet -g lorikeet /data
# The dependencies are a layer of their own, so a change of our code ships the small layer after it.
COPY --from=dependencies /opt/lorikeet /opt/lorikeet
COPY --from=wheel /wheels /wheels
RUN /opt/lorikeet/bin/pip install --no-cache-dir --no-deps --no-index /wheels/*.whl
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
ENTRYPOINT ["tini", "--"]
CMD ["edge-node", "serve"]
