# Central. Build from the repository root: docker build -f deploy/images/central.Dockerfile -t lorikeet/central:0.1.0 .
FROM python:3.11.13-slim-bookworm AS build
WORKDIR /src
COPY requirements/central.lock requirements/central.lock
RUN python -m venv /opt/lorikeet \
 && /opt/lorikeet/bin/pip install --no-cache-dir --no-deps -r requirements/central.lock
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY edge_node edge_node
COPY central central
RUN /opt/lorikeet/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11.13-slim-bookworm
RUN groupadd --gid 10001 lorikeet \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin lorikeet \
 && install -d -o lorikeet -g lorikeet /data
COPY --from=build /opt/lorikeet /opt/lorikeet
ENV PATH=/opt/lorikeet/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    CENTRAL_DATA_DIR=/data \
    CENTRAL_LISTEN__HOST=0.0.0.0
USER 10001:10001
VOLUME /data
EXPOSE 9443 9444
STOPSIGNAL SIGTERM
CMD ["central", "serve"]
