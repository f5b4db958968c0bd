# Central. Build from the repository root: docker build -f deploy/images/central.Dockerfile -t
# lorikeet/central:0.1.0 .
FROM python:3.11.13-slim-bookworm AS dependencies
WORKDIR /src
COPY requirements/central.lock requirements/central.lock
RUN python -m venv /opt/lorikeet \
 && /opt/lorikeet/bin/pip install --no-cache-dir --no-deps -r requirements/central.lock

FROM dependencies AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY lorikeet lorikeet
COPY edge_node edge_node
COPY central central
RUN /opt/lorikeet/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels .

FROM python:3.11.13-slim-bookworm
# tini is PID 1: it passes a signal on from the first moment, and reaps what a killed child leaves
# behind.
RUN apt-get update \
 && apt-get install -y --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 lorikeet \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin lorikeet \
 && install -d -o lorikeet -g lorikeet /data /backup
# The dependencies are a layer of their own, so a change of our code ships the small layer after it.
COPY --from=dependencies /opt/lorikeet /opt/lorikeet
COPY --from=wheel /wheels /wheels
RUN /opt/lorikeet/bin/pip install --no-cache-dir --no-deps --no-index /wheels/*.whl
# MALLOC_*: threads share two heaps, and large pieces go back to the system after a flood of calls.
ENV PATH=/opt/lorikeet/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MALLOC_ARENA_MAX=2 \
    MALLOC_MMAP_THRESHOLD_=65536 \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    CENTRAL_DATA_DIR=/data \
    CENTRAL_LISTEN__HOST=0.0.0.0
USER 10001:10001
VOLUME /data
EXPOSE 9443 9444
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--"]
CMD ["central", "serve"]
