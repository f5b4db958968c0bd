# Edge node for CPU. Build from the repository root, and name PyTorch's CPU wheel index (it is not on PyPI):
#   docker build -f deploy/images/edge-node-cpu.Dockerfile --build-arg TORCH_INDEX=<PyTorch's CPU wheel index> \
#     -t lorikeet/edge-node-cpu:0.1.0 .
FROM python:3.11.13-slim-bookworm AS build
ARG TORCH_INDEX
WORKDIR /src
COPY requirements/cpu.lock requirements/cpu.lock
# The lock also pins test tools (Helm, hypothesis, mypy); they cost about 0.3 GB and keep one lock for one platform.
RUN python -m venv /opt/lorikeet \
 && /opt/lorikeet/bin/pip install --no-cache-dir --no-deps ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
      -r requirements/cpu.lock
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY edge_node edge_node
COPY central central
RUN /opt/lorikeet/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11.13-slim-bookworm
# vLLM's CPU kernels link libnuma; torch's compiler wants a C++ compiler at run time.
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
