"""The supervisor of an edge node. Cast:

- `VllmProcess`: the child that serves; capture, feedback and the alias table live inside it.
- `LearnerProcess`: the child that trains rounds and leaves updates in the outbox.
- `Uploader`: brings updates from the outbox to central.
- `ReleaseWatcher`: follows central's releases, loads them into vLLM, evaluates candidates, reports status.

In: settings. Runs until SIGTERM or SIGINT, then stops against the flow: serving first, stores last.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_node.environments import load_environment
from edge_node.errors import SettingsError, StorageError
from edge_node.experience import ExperienceStore
from edge_node.heartbeat import beat
from edge_node.identity import Identity, keep_identity, request_enrollment
from edge_node.learning import LearnerProcess, open_starts
from edge_node.outbox import Outbox, Uploader
from edge_node.releases.evaluation import Evaluator, evaluation_seed
from edge_node.releases.store import ReleaseStore
from edge_node.releases.watcher import ReleaseWatcher
from edge_node.serving import ControlClient, VllmProcess
from edge_node.settings import EdgeSettings
from protos.base import BaseModelError, BaseModelInfo, read_base_model
from protos.fleet.v1 import fleet_pb2

log = logging.getLogger(__name__)


def read_base(settings: EdgeSettings) -> BaseModelInfo:
    """The node's base model; raises SettingsError."""
    if settings.base.path is None:
        raise SettingsError("EDGE_BASE__PATH is not set. Set it to the Hugging Face directory of the base model.")
    try:
        return read_base_model(settings.base.path)
    except BaseModelError as error:
        raise SettingsError(f"EDGE_BASE__PATH: {error}") from error


async def enroll(settings: EdgeSettings) -> Identity:
    """Enrol this node, or return the identity it has; the cohort's first release is on disk afterwards.

    Raises:
        EnrollmentError, CentralUnreachable, StorageError, SettingsError.
    """
    base = await asyncio.to_thread(read_base, settings)
    if not (settings.data_dir / "identity" / "identity.json").is_file():
        answer = await request_enrollment(settings, base.digest)
        store = ReleaseStore(settings.data_dir, answer.identity, base, settings.releases.max_rank)
        store.clear_leftovers()
        genesis = store.install(answer.genesis, answer.genesis_payload)
        if store.active() is None:
            store.activate(genesis)
        keep_identity(settings.data_dir, answer.identity)
    identity = Identity.load(settings.data_dir)
    if identity.base != base.digest:
        raise SettingsError(
            f"EDGE_BASE__PATH has digest {base.digest[:12]}; this node was enrolled with base {identity.base[:12]}. "
            "Point EDGE_BASE__PATH at that model, or enrol a new node with a new EDGE_DATA_DIR."
        )
    return identity


def control_socket(data_dir: Path) -> Path:
    """Where vLLM's control socket is: short, because a Unix socket's path has at most 107 bytes."""
    name = hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"lorikeet-{os.getuid()}-{name}.sock"


@contextmanager
def own_data_dir(data_dir: Path) -> Iterator[None]:
    """Hold the data directory for one supervisor; raises StorageError when it is not writable or already held."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / "supervisor.lock").open("w")
    except OSError as error:
        raise StorageError(
            f"Data directory {data_dir} is not writable: {error.strerror}. Set EDGE_DATA_DIR to a writable directory."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"Another edge node runs on data directory {data_dir}. Stop it, or set another EDGE_DATA_DIR."
            ) from error
        yield


async def serve(settings: EdgeSettings) -> None:
    """Run the node until a signal; raises EdgeError when it cannot start."""
    with own_data_dir(settings.data_dir):
        heart = asyncio.create_task(beat(settings.data_dir))
        identity = await enroll(settings)
        base = await asyncio.to_thread(read_base, settings)
        environments = {spec.name: (spec, load_environment(spec)) for spec in settings.environments}
        store = ReleaseStore(settings.data_dir, identity, base, settings.releases.max_rank)
        store.clear_leftovers()
        await asyncio.to_thread(store.fit_ranks)
        experience = ExperienceStore(settings.data_dir / "experience.db")
        outbox = Outbox(settings.data_dir / "outbox", settings.outbox.approval)
        socket = control_socket(settings.data_dir)
        vllm = VllmProcess(settings, base, socket)
        learner = LearnerProcess(settings)

        def counts() -> fleet_pb2.NodeStatus:
            states: list[str] = [entry.state for entry in outbox.list()]
            kept = experience.counts()
            return fleet_pb2.NodeStatus(
                outbox_waiting=states.count("waiting"),
                outbox_held=states.count("held"),
                experiences=kept.examples,
                unusable_experiences=kept.unusable,
                problem=uploader.problem,
                max_release_rank=settings.releases.max_rank or 0,
            )

        async with identity.channel(settings) as channel:
            control = ControlClient(socket)
            uploader = Uploader(outbox, channel, identity, settings)
            evaluator = Evaluator(settings.serving.url, environments, evaluation_seed(identity.node_id))
            watcher = ReleaseWatcher(
                settings, channel, store, vllm, control, evaluator, counts, lambda: open_starts(settings.data_dir)
            )
            stop = asyncio.Event()
            for name in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(name, stop.set)
            log.info("edge node starts", extra={"node_id": identity.node_id, "cohort": identity.cohort})
            rooms = [vllm.run(), watcher.run(), uploader.run()]
            if settings.learning.enabled:
                rooms.append(learner.run())
            tasks = [asyncio.create_task(room) for room in rooms]
            stopped = asyncio.create_task(stop.wait())
            try:
                done, _ = await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in tasks if task in done]:  # vLLM's own error before what follows from it
                    task.result()  # a room that ends by itself ended with an error
            finally:
                stopped.cancel()
                await vllm.aclose()
                await learner.aclose()
                await uploader.aclose()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        heart.cancel()
        log.info("edge node stopped", extra={"node_id": identity.node_id})
