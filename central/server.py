"""Central's process: opens the stores, serves gRPC, runs the cohorts, and stops against the flow.

In: CentralSettings. Out: two ports - mutual TLS for nodes and operators, server TLS for enrolment.
The stores on disk are in rooms.py; each cohort has a thread with a Flower ServerApp (cohorts.py).
Guarantee: a kill at any point loses nothing that was acknowledged; the next start goes on from
journal and blobs.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import grpc
import sqlalchemy as sa

from central import __version__, faults
from central.calls import Calls
from central.cohorts import CohortThreads
from central.descriptors import allowed_connections, watch_connections
from central.errors import ListenError, SettingsError
from central.fleet.enrollment import EnrollmentService
from central.fleet.identity import Authenticator
from central.fleet.presence import Presence
from central.fleet.service import HEARTBEAT_S, FleetService
from central.intake.admission import Admission
from central.intake.service import UpdateService
from central.monitoring.figures import Sources, make_registry
from central.monitoring.port import metrics_port
from central.operators.service import OperatorService
from central.releases.service import ReleaseService
from central.rooms import Rooms, open_rooms
from central.rpc import ErrorTranslator, enrollment_options, server_options
from central.settings import CentralSettings
from central.tracing import JournalTracer
from central.webhooks.running import make_tellers, telling
from central.webhooks.teller import Source, Teller
from lorikeet import traces
from protos.fleet.v1 import fleet_pb2_grpc
from protos.operators.v1 import operators_pb2_grpc
from protos.releases.v1 import releases_pb2_grpc
from protos.updates.v1 import updates_pb2_grpc

log = logging.getLogger(__name__)

STOP_GRACE_S = 5.0
"""Calls in flight have this long to end."""


async def serve(settings: CentralSettings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; `announce` gets one line when central is ready.

    Raises SettingsError, StorageError or ListenError when central cannot start.
    """
    faults.arm()
    _start_traces(settings)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with ExitStack() as stack:
        rooms = await asyncio.to_thread(open_rooms, settings, stack)
        # The history stays: a search for garbage that walks it stops every thread, for 0.7 s at
        # 100,000 updates.
        gc.freeze()
        presence = Presence()
        cohorts: CohortThreads
        run_cohort = await asyncio.to_thread(
            _load_federation, rooms, settings, presence, lambda cohort: cohorts.went_on(cohort)
        )
        cohorts = CohortThreads(rooms.journal, run_cohort)
        stopped = threading.Event()
        try:
            async with Services(rooms, settings, presence, failure=cohorts.failure) as services:
                tellers = await asyncio.to_thread(_make_tellers, settings, rooms, services)
                _serve_metrics(stack, settings, rooms, services, tellers)
                stack.enter_context(telling(tellers))
                if settings.traces.endpoint is not None:
                    JournalTracer(rooms.journal).start()
                await asyncio.to_thread(cohorts.start)
                for name, work in (
                    ("retention", rooms.collector.run),
                    ("journal-head", rooms.heads.run),
                ):
                    threading.Thread(target=work, args=(stopped,), name=name, daemon=True).start()
                listen = settings.listen
                announce(
                    f"central is ready on {_address(listen.host, listen.port)}, enrolment on "
                    f"{_address(listen.host, listen.enrollment_port)}, base "
                    f"{rooms.base.digest[:8]}, "
                    f"data in {settings.data_dir}"
                )
                await stop.wait()
                log.info("central stops")
        finally:
            stopped.set()
            await asyncio.to_thread(cohorts.close)
            await asyncio.to_thread(traces.stop)


class Services:
    """The two gRPC servers with their services; an asynchronous context."""

    def __init__(
        self,
        rooms: Rooms,
        settings: CentralSettings,
        presence: Presence,
        heartbeat_s: float = HEARTBEAT_S,
        failure: Callable[[str], str] = lambda cohort: "",
    ) -> None:
        """Made on the event loop; listens on nothing yet.

        `failure` says why a cohort's loop does not go on.
        """
        self._rooms = rooms
        self._settings = settings
        self._authenticator = Authenticator(rooms.journal)
        self.presence = presence
        self.failure = failure
        self._fleet = FleetService(
            rooms.journal,
            self._authenticator,
            self.presence,
            heartbeat_s,
            settings.limits.node_watches,
        )
        self.calls = Calls()
        """How the calls of both ports ended."""
        self._servers: list[grpc.aio.Server] = []
        self._connections = allowed_connections(settings.limits)
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Services:
        listen, pki = self._settings.listen, self._rooms.pki
        pair = [(pki.server_key_pem, pki.server_certificate_pem)]
        mutual = grpc.ssl_server_credentials(
            pair, root_certificates=pki.ca_pem, require_client_auth=True
        )
        try:
            await self._listen(self._mutual_server(), mutual, listen.host, listen.port, "PORT")
            await self._listen(
                self._enrollment_server(),
                grpc.ssl_server_credentials(pair),
                listen.host,
                listen.enrollment_port,
                "ENROLLMENT_PORT",
            )
        except BaseException:
            await self.aclose(0.0)
            raise
        everybody = self._connections + self._settings.limits.enrollment_connections
        self._watch = asyncio.create_task(watch_connections(everybody))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose(STOP_GRACE_S)

    async def aclose(self, grace_s: float) -> None:
        """End watches, refuse new calls, and give those in flight `grace_s`; idempotent."""
        self._fleet.close()
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))

    async def _listen(
        self,
        server: grpc.aio.Server,
        credentials: grpc.ServerCredentials,
        host: str,
        port: int,
        setting: str,
    ) -> None:
        try:
            await asyncio.to_thread(_try_port, host, port)
            server.add_secure_port(_address(host, port), credentials)
        except (OSError, RuntimeError) as error:
            raise ListenError(
                f"Central cannot listen on {_address(host, port)}: "
                f"{getattr(error, 'strerror', None) or error}. "
                f"Stop the program that has the port, or set CENTRAL_LISTEN__{setting} or "
                "CENTRAL_LISTEN__HOST."
            ) from error
        await server.start()
        self._servers.append(server)

    def _mutual_server(self) -> grpc.aio.Server:
        rooms, authenticator = self._rooms, self._authenticator
        admission = Admission(
            rooms.journal,
            rooms.blobs,
            rooms.uploads,
            authenticator,
            rooms.pki.release_key,
            rooms.base,
            self._settings.limits,
            rooms.space,
            rooms.collector.make_room,
        )
        options = server_options(self._settings.limits, self._connections)
        server = grpc.aio.server(interceptors=[ErrorTranslator(self.calls)], options=options)
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(self._fleet, server)
        updates_pb2_grpc.add_UpdateServiceServicer_to_server(
            UpdateService(admission, rooms.uploads, authenticator, self._settings.limits), server
        )
        releases_pb2_grpc.add_ReleaseServiceServicer_to_server(
            ReleaseService(rooms.journal, rooms.blobs, authenticator), server
        )
        operators_pb2_grpc.add_OperatorServiceServicer_to_server(
            OperatorService(
                rooms.journal,
                rooms.registry,
                rooms.blobs,
                authenticator,
                self.presence,
                rooms.pki.ca_pem,
                self._settings.channels,
                rooms.collector,
                self.failure,
                rooms.space.shortage,
            ),
            server,
        )
        return server

    def _enrollment_server(self) -> grpc.aio.Server:
        rooms = self._rooms
        options = enrollment_options(self._settings.limits)
        server = grpc.aio.server(interceptors=[ErrorTranslator(self.calls)], options=options)
        fleet_pb2_grpc.add_EnrollmentServiceServicer_to_server(
            EnrollmentService(rooms.journal, rooms.blobs, rooms.pki, rooms.base.digest), server
        )
        return server


def _start_traces(settings: CentralSettings) -> None:
    """Raises SettingsError when they are wanted and cannot be."""
    if settings.traces.endpoint is None:
        return
    if not traces.is_installed():
        raise SettingsError(
            f"CENTRAL_TRACES__ENDPOINT is set, and {traces.NOT_INSTALLED}. Run `pip install "
            "'lorikeet-federated[central,otel]'`, or unset it."
        )
    traces.start(settings.traces.endpoint, "lorikeet-central", __version__, sample=0)


def _make_tellers(settings: CentralSettings, rooms: Rooms, services: Services) -> list[Teller]:
    """Raises SettingsError, StorageError."""
    source = Source(rooms.journal, services.presence, services.failure, rooms.space.shortage)
    return make_tellers(settings.webhooks, settings.data_dir, source)


def _serve_metrics(
    stack: ExitStack,
    settings: CentralSettings,
    rooms: Rooms,
    services: Services,
    tellers: list[Teller],
) -> None:
    """The port for Prometheus, where one is set; raises ListenError."""
    listen, url = settings.listen, sa.make_url(settings.journal_url)
    if listen.metrics_port is None:
        return
    is_file = url.get_backend_name() == "sqlite" and url.database
    sources = Sources(
        rooms.journal,
        services.presence,
        rooms.uploads,
        rooms.space,
        services.calls,
        services.failure,
        tellers,
        Path(url.database) if is_file and url.database else None,
    )
    address = stack.enter_context(
        metrics_port(make_registry(sources), listen.metrics_host, listen.metrics_port)
    )
    log.info("metrics are served", extra={"address": address})


def _load_federation(
    rooms: Rooms, settings: CentralSettings, presence: Presence, went_on: Callable[[str], None]
) -> Callable[[str, threading.Event], None]:
    """The loop of one cohort; raises SettingsError for a strategy that cannot work.

    Flower is imported here, not before.
    """
    # Flower reports its use to its makers unless told otherwise.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    from central.cohort import check_strategy, run_cohort

    for policy in (
        settings.merge,
        *(settings.merge.policy(cohort) for cohort in settings.merge.cohorts),
    ):
        check_strategy(policy.strategy, policy.strategy_options, policy.min_updates)

    def run(cohort: str, stop: threading.Event) -> None:
        run_cohort(
            cohort,
            rooms.journal,
            rooms.registry,
            rooms.blobs,
            settings,
            stop,
            presence.is_connected,
            went_on=partial(went_on, cohort),
        )

    return run


def _try_port(host: str, port: int) -> None:
    """Raises OSError with the reason; gRPC would only say in its own log that it failed."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
