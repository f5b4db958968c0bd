"""Central's process: opens the stores, serves gRPC, runs one Flower loop per cohort, and stops against the flow.

In: CentralSettings. Out: two ports - mutual TLS for nodes and operators, server TLS for enrolment. The cast:

    DataLock        one central per data directory; WriterLock: one per journal, wherever its database is
    Journal         the only truth (journal/); Heads: where it ends (heads.py)
    Pki             keys and certificates (fleet/)
    BlobStore       payloads; Registry: releases and channels (registry/)
    PartialUploads  updates on their way; Admission: checks and admits them (intake/)
    CohortThreads   one Flower ServerApp loop per cohort (federation/)
    Collector       deletes payloads that nothing needs any more (storage/); Space: the room that uploads leave (space.py)

Guarantee: a kill at any point loses nothing that was acknowledged; the next start goes on from journal and blobs.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import sqlalchemy as sa

from central import faults
from central.cohorts import CohortThreads
from central.descriptors import allowed_connections, watch_connections
from central.durable import make_directory, storage
from central.errors import ListenError, SettingsError, StorageError
from central.file_lock import DataLock
from central.fleet.enrollment import EnrollmentService
from central.fleet.identity import Authenticator
from central.fleet.pki import Pki
from central.fleet.presence import Presence
from central.fleet.service import HEARTBEAT_S, FleetService
from central.heads import FILE as HEAD_FILE
from central.heads import Heads, kept_heads
from central.history import expect_begun, expect_history, unnamed_blobs
from central.intake.admission import Admission
from central.intake.partial import PartialUploads
from central.intake.service import UpdateService
from central.journal import Journal, WriterLock, count_events
from central.journal.payloads import stored_blobs
from central.operator.service import OperatorService
from central.registry import BlobStore, DirectoryBlobs, Registry, open_blobs
from central.registry.service import ReleaseService
from central.rpc import ErrorTranslator, bound_heaps, enrollment_options, server_options
from central.settings import CentralSettings
from central.space import Space
from central.storage.collector import Collector
from central.storage.restore import expect_no_unfinished_restore
from protos.base import BaseModelError, BaseModelInfo, read_base_model
from protos.fleet.v1 import fleet_pb2_grpc
from protos.operator.v1 import operator_pb2_grpc
from protos.releases.v1 import releases_pb2_grpc
from protos.updates.v1 import updates_pb2_grpc

log = logging.getLogger(__name__)

STOP_GRACE_S = 5.0
"""Calls in flight have this long to end."""


@dataclass(frozen=True)
class Rooms:
    """Everything that lives on disk, opened."""

    base: BaseModelInfo
    journal: Journal
    pki: Pki
    blobs: BlobStore
    registry: Registry
    partial: PartialUploads
    collector: Collector
    heads: Heads
    space: Space


async def serve(settings: CentralSettings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; `announce` gets one line when central is ready.

    Raises SettingsError, StorageError or ListenError when central cannot start.
    """
    faults.arm()
    bound_heaps()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with ExitStack() as stack:
        rooms = await asyncio.to_thread(open_rooms, settings, stack)
        gc.freeze()  # the history stays: a search for garbage that walks it stops every thread (0.7 s at 100,000 updates)
        presence = Presence()
        cohorts: CohortThreads
        run_cohort = await asyncio.to_thread(
            _load_federation, rooms, settings, presence, lambda cohort: cohorts.went_on(cohort)
        )
        cohorts = CohortThreads(rooms.journal, run_cohort)
        stopped = threading.Event()
        try:
            async with Services(rooms, settings, presence, failure=cohorts.failure):
                await asyncio.to_thread(cohorts.start)
                for name, work in (("retention", rooms.collector.run), ("journal-head", rooms.heads.run)):
                    threading.Thread(target=work, args=(stopped,), name=name, daemon=True).start()
                listen = settings.listen
                announce(
                    f"central is ready on {_address(listen.host, listen.port)}, enrolment on "
                    f"{_address(listen.host, listen.enrollment_port)}, base {rooms.base.digest[:8]}, "
                    f"data in {settings.data_dir}"
                )
                await stop.wait()
                log.info("central stops")
        finally:
            stopped.set()
            await asyncio.to_thread(cohorts.close)


def open_rooms(settings: CentralSettings, stack: ExitStack) -> Rooms:
    """Open everything on disk, recovering what a kill left; `stack` closes it again. Blocks."""
    stack.enter_context(DataLock(settings.data_dir))
    expect_no_unfinished_restore(settings.data_dir)
    base = _read_base(settings)
    blobs = open_blobs(settings)
    space = Space(_places(settings, blobs), settings.limits.reserve_bytes)
    space.expect_possible()
    space.release_ballast()  # what is written at start may find the disk full
    stack.enter_context(WriterLock(settings.journal_url))
    kept = kept_heads(settings.data_dir, blobs)
    served_before = (settings.data_dir / HEAD_FILE).exists() or count_events(settings.journal_url) > 0
    names = [*settings.listen.names, *_listen_name(settings.listen.host)]
    pki = Pki.load_or_create(settings.data_dir, names, served_before)
    is_ours = blobs.owner() == pki.identity  # what lies in a store that is handed over is no sign of a lost journal
    blobs.expect_owner(pki.identity)
    partial = PartialUploads(settings.data_dir / "uploads", settings.limits.node_unfinished)
    if is_ours:
        expect_begun(settings.journal_url, kept, settings.data_dir, blobs)
    heads = Heads(settings.data_dir, blobs, pki.release_key)
    journal = Journal(settings.journal_url, seals=heads)
    stack.callback(journal.close)
    expect_history(journal, kept, settings.data_dir, blobs, pki.release_key_pem)
    with journal.read() as state:
        blobs.expect_some(stored_blobs(state))
    blobs.claim(pki.identity)
    heads.start(journal)
    stack.callback(_copy_head, heads)
    blobs.prepare()  # a kill may leave its probe: from here on that is no sign of a lost journal
    _expect_same_base(journal, base)
    _expect_same_cohorts(journal, settings)
    registry = Registry(journal, blobs, pki.release_key, base.digest, settings.builds_on)
    with journal.read() as state:
        partial.discard_all(state.updates)  # a kill may have come between an update's admission and this
    collector = Collector(journal, blobs, partial, settings.retention, space=space)
    collector.recover()
    _report_unnamed(journal, blobs)
    space.take_ballast()
    if text := space.shortage():
        log.warning("no upload is taken", extra={"reason": text})
    return Rooms(base, journal, pki, blobs, registry, partial, collector, heads, space)


def _copy_head(heads: Heads) -> None:
    """At the stop; the next start does it again."""
    try:
        heads.copy()
    except StorageError as error:
        log.error("the journal's head is not copied", extra={"detail": str(error)})


def _report_unnamed(journal: Journal, blobs: BlobStore) -> None:
    with journal.read() as state:
        found = unnamed_blobs(state, blobs)
    if found:  # an upload that was interrupted leaves one, and names it when the node goes on
        log.warning("blobs that no event names", extra={"blobs": len(found), "list": "central journal verify"})


def _places(settings: CentralSettings, blobs: BlobStore) -> list[Path]:
    """The directories that central writes to, one on each disk."""
    journal = sa.make_url(settings.journal_url)
    places = [settings.data_dir]
    if journal.get_backend_name() == "sqlite" and journal.database:
        places.append(Path(journal.database).parent)
    if isinstance(blobs, DirectoryBlobs):
        places.append(blobs.root)
    found: dict[int, Path] = {}
    for place in places:
        make_directory(place)
        with storage(place):
            found.setdefault(place.stat().st_dev, place)
    return list(found.values())


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
        """Made on the event loop; listens on nothing yet. `failure` says why a cohort's loop does not go on."""
        self._rooms = rooms
        self._settings = settings
        self._authenticator = Authenticator(rooms.journal)
        self._presence = presence
        self._failure = failure
        self._fleet = FleetService(
            rooms.journal, self._authenticator, self._presence, heartbeat_s, settings.limits.node_watches
        )
        self._servers: list[grpc.aio.Server] = []
        self._connections = allowed_connections(settings.limits)
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Services:
        listen, pki = self._settings.listen, self._rooms.pki
        pair = [(pki.server_key_pem, pki.server_certificate_pem)]
        mutual = grpc.ssl_server_credentials(pair, root_certificates=pki.ca_pem, require_client_auth=True)
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
        self, server: grpc.aio.Server, credentials: grpc.ServerCredentials, host: str, port: int, setting: str
    ) -> None:
        try:
            await asyncio.to_thread(_try_port, host, port)
            server.add_secure_port(_address(host, port), credentials)
        except (OSError, RuntimeError) as error:
            raise ListenError(
                f"Central cannot listen on {_address(host, port)}: {getattr(error, 'strerror', None) or error}. "
                f"Stop the program that has the port, or set CENTRAL_LISTEN__{setting} or CENTRAL_LISTEN__HOST."
            ) from error
        await server.start()
        self._servers.append(server)

    def _mutual_server(self) -> grpc.aio.Server:
        rooms, authenticator = self._rooms, self._authenticator
        admission = Admission(
            rooms.journal,
            rooms.blobs,
            rooms.partial,
            authenticator,
            rooms.pki.release_key,
            rooms.base,
            self._settings.limits,
            rooms.space,
            rooms.collector.make_room,
        )
        options = server_options(self._settings.limits, self._connections)
        server = grpc.aio.server(interceptors=[ErrorTranslator()], options=options)
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(self._fleet, server)
        updates_pb2_grpc.add_UpdateServiceServicer_to_server(
            UpdateService(admission, rooms.partial, authenticator, self._settings.limits), server
        )
        releases_pb2_grpc.add_ReleaseServiceServicer_to_server(
            ReleaseService(rooms.journal, rooms.blobs, authenticator), server
        )
        operator_pb2_grpc.add_OperatorServiceServicer_to_server(
            OperatorService(
                rooms.journal,
                rooms.registry,
                rooms.blobs,
                authenticator,
                self._presence,
                rooms.pki.ca_pem,
                self._settings.channels,
                rooms.collector,
                self._failure,
                rooms.space.shortage,
            ),
            server,
        )
        return server

    def _enrollment_server(self) -> grpc.aio.Server:
        rooms = self._rooms
        options = enrollment_options(self._settings.limits)
        server = grpc.aio.server(interceptors=[ErrorTranslator()], options=options)
        fleet_pb2_grpc.add_EnrollmentServiceServicer_to_server(
            EnrollmentService(rooms.journal, rooms.blobs, rooms.pki, rooms.base.digest), server
        )
        return server


def _load_federation(
    rooms: Rooms, settings: CentralSettings, presence: Presence, went_on: Callable[[str], None]
) -> Callable[[str, threading.Event], None]:
    """The loop of one cohort; raises SettingsError for a strategy that cannot work. Flower is imported here, not before."""
    # Flower reports its use to its makers unless told otherwise.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    from central.federation import check_strategy, run_cohort

    for policy in (settings.merge, *(settings.merge.policy(cohort) for cohort in settings.merge.cohorts)):
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


def _read_base(settings: CentralSettings) -> BaseModelInfo:
    if settings.base.path is None:
        raise SettingsError(
            "CENTRAL_BASE__PATH is not set. Set it to the Hugging Face directory of the base model that the nodes serve."
        )
    try:
        return read_base_model(settings.base.path, memory=settings.data_dir)
    except BaseModelError as error:
        raise SettingsError(f"CENTRAL_BASE__PATH is not usable. {error}") from error


def _expect_same_base(journal: Journal, base: BaseModelInfo) -> None:
    with journal.read() as state:
        known = next((state.genesis(cohort).manifest.base for cohort in state.cohorts()), base.digest)
    if known != base.digest:
        raise SettingsError(
            f"The base model at {base.path} has digest {base.digest}; the releases in CENTRAL_DATA_DIR are for {known}. "
            "Point CENTRAL_BASE__PATH at that base model, or CENTRAL_DATA_DIR at a new directory."
        )


def _expect_same_cohorts(journal: Journal, settings: CentralSettings) -> None:
    with journal.read() as state:
        for cohort, wanted in settings.cohorts.builds_on.items():
            made = state.builds_on.get(cohort, "none")
            if cohort in state.cohorts() and wanted != made:
                raise SettingsError(
                    f"CENTRAL_COHORTS__BUILDS_ON says that cohort {cohort!r} builds on {wanted}; it was made to build on {made}, and "
                    "its releases do. Set it back, or make a cohort of another name and enrol the nodes there."
                )


def _try_port(host: str, port: int) -> None:
    """Raises OSError with the reason; gRPC would only say that it failed, and print a line of its own."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen_name(host: str) -> list[str]:
    return [] if host in ("0.0.0.0", "::") else [host]
