# Edge node for CPU. Build from the repository root, and name PyTorch's CPU wheel index (it is not
# on PyPI):   docker build -f deploy/images/edge-node-cpu.Dockerfile --build-arg
# TORCH_INDEX=<PyTorch's CPU wheel index> \     -t lorikeet/edge-node-cpu:0.1.0 .
FROM python:3.11.13-slim-bookworm AS dependencies
ARG TORCH_INDEX
WORKDIR /src
COPY requirements/node-cpu.lock requirements/node-cpu.lock
RUN python -m venv /opt/lorikeet \
 && /opt/lorikeet/bin/pip install --no-cache-dir --no-deps ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
      -r requirements/node-cpu.lock

FROM dependencies AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY lorikeet lorikeet
COPY edge_node edge_node
COPY central central
RUN /opt/lorikeet/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels .

FROM python:3.11.13-slim-bookworm
# vLLM's CPU kernels link libnuma; torch's compiler wants a C++ compiler at run time. tini is PID 1:
# it passes a signal on from the first moment, and reaps what a killed child leaves behind.
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
