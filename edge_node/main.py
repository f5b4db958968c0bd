"""The supervisor of an edge node. Cast:

- `VllmProcess`: the child that serves; capture, feedback and the alias table live inside it.
- `LearnerProcess`: the child that trains rounds and leaves updates in the outbox.
- `Uploader`: brings updates from the outbox to central.
- `EnvironmentProcess`, one for each environment: the child that runs a plug-in.
- `ReleaseWatcher`: follows releases, loads them into vLLM, evaluates candidates, reports status.
- `Trimmer`: removes experience that is too old or too much.
- `Problems`: what fails in any of them now; `look_around` adds disk and certificate.

In: settings. Runs until SIGTERM or SIGINT, then stops against the flow: serving first, stores last.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sqlite3
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from edge_node.base_model import check_base, read_base
from edge_node.capture import load_redactor
from edge_node.environments import EnvironmentProcess, in_own_thread
from edge_node.episodes import read_rules
from edge_node.errors import (
    CentralUnreachable,
    EdgeError,
    EnvironmentFault,
    ServingError,
    SettingsError,
    StorageError,
)
from edge_node.experience import Trimmer, open_experience
from edge_node.figures.gather import Gatherer, tell
from edge_node.heartbeat import beat
from edge_node.identity import Identity, keep_identity, request_enrollment
from edge_node.learning import LearnerProcess, open_starts
from edge_node.learning.records import RoundStore
from edge_node.outbox import Outbox, Uploader
from edge_node.problems import Problems
from edge_node.proof import make_proof
from edge_node.releases.evaluation import Evaluator, evaluation_seed
from edge_node.releases.probation import Probation
from edge_node.releases.store import ReleaseStore
from edge_node.releases.trouble import next_step, words
from edge_node.releases.watcher import ReleaseWatcher
from edge_node.serving import ControlClient, VllmProcess, control_socket
from edge_node.settings import EdgeSettings
from edge_node.sizing import expect_trainable
from edge_node.surroundings import give_room, look_around
from lorikeet.durable import remove_temporary_files
from lorikeet.locks import locked
from lorikeet.pauses import doubling
from protos.fleet.v1 import fleet_pb2

log = logging.getLogger(__name__)

T = TypeVar("T")
ENROL_PAUSE_FIRST_S = 1.0
ENROL_PAUSE_LAST_S = 30.0
"""Pauses between two tries to reach central; they double."""
WITH_FILES = ("identity", "outbox", "releases")
"""Folders of the data directory in which a killed node may leave half a file."""


async def enroll(settings: EdgeSettings) -> Identity:
    """Enrol this node or return its identity; then the cohort's first release is on disk.

    Raises:
        EnrollmentError, CentralUnreachable, StorageError, SettingsError.
    """
    base = await asyncio.to_thread(check_base, settings)
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
            f"EDGE_BASE__PATH has digest {base.digest[:12]}; this node was enrolled with base "
            f"{identity.base[:12]}. Point EDGE_BASE__PATH at that model, or enrol a new node with "
            "a new EDGE_DATA_DIR."
        )
    return identity


@contextmanager
def own_data_dir(data_dir: Path) -> Iterator[None]:
    """Hold the data directory for one supervisor; raises StorageError when that fails."""
    with ExitStack() as held:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(data_dir / "supervisor.lock"))
            give_room(data_dir)
            for room in WITH_FILES:
                remove_temporary_files(data_dir / room)
        except BlockingIOError as error:
            raise StorageError(
                f"Another edge node runs on data directory {data_dir}. "
                "Stop it, or set another EDGE_DATA_DIR."
            ) from error
        except OSError as error:
            raise StorageError(
                f"Data directory {data_dir} is not writable: {error.strerror}. "
                "Set EDGE_DATA_DIR to a writable directory."
            ) from error
        yield


async def enroll_when_central_answers(settings: EdgeSettings) -> Identity:
    """As `enroll`, but asks a central that cannot be reached again and again; raises all else."""
    problems = Problems(settings.data_dir)
    pauses = doubling(ENROL_PAUSE_FIRST_S, ENROL_PAUSE_LAST_S)
    while True:
        try:
            identity = await enroll(settings)
        except CentralUnreachable as error:
            problems.report(
                "enrolment",
                str(error),
                f"The node asks again, every {ENROL_PAUSE_LAST_S:.0f} s in the end.",
            )
        else:
            problems.clear("enrolment")
            return identity
        await asyncio.sleep(next(pauses))


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None when `stop` is set before, which ends the work."""
    task, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        stopping.cancel()


async def load_environments(processes: list[EnvironmentProcess], problems: Problems) -> bool:
    """Load each in its worker. One that hangs or crashes is a problem, and the node goes on.

    Raises SettingsError for one that does not exist. Returns True.
    """

    async def load(process: EnvironmentProcess) -> None:
        try:
            await in_own_thread(process.start)
        except EnvironmentFault as fault:
            problems.report("environments", words(fault), next_step(fault))

    await asyncio.gather(*map(load, processes))
    return True


@contextmanager
def _telling_its_end(settings: EdgeSettings) -> Iterator[Problems]:
    """The problems, without those of rooms switched off, and with why the node ended."""
    problems = Problems(settings.data_dir)
    off = [] if settings.learning.enabled else ["learner", "learning"]
    off += [] if settings.capture.enabled else ["capture", "feedback"]
    off += (
        []
        if settings.releases.evaluate and settings.environments
        else ["evaluation", "environments"]
    )
    for room in off:  # they will not succeed any more, and what they suffered from is over
        problems.clear(room)
    try:
        yield problems
    except (EdgeError, OSError, sqlite3.Error) as error:
        if not (
            isinstance(error, ServingError)
            and "serving" in {problem.room for problem in problems.current()}
        ):
            problems.report(
                "node",
                f"`edge-node serve` ended: {error}",
                "Mend what it says, then start `edge-node serve`.",
            )
        raise


async def serve(settings: EdgeSettings) -> None:
    """Run the node until a signal; raises EdgeError when it cannot start."""
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    with (
        own_data_dir(settings.data_dir),
        _telling_its_end(settings) as problems,
        ExitStack() as held,
    ):
        heart = asyncio.create_task(beat(settings.data_dir))
        identity = await _unless(stop, enroll_when_central_answers(settings))
        if identity is None:
            log.info("edge node stopped before it was enrolled")
            return
        load_redactor(settings.capture.redaction)  # a mistake in it ends the node here
        base = await asyncio.to_thread(read_base, settings)
        if settings.learning.enabled:
            await asyncio.to_thread(expect_trainable, settings, base)
        processes = [held.enter_context(EnvironmentProcess(spec)) for spec in settings.environments]
        if await _unless(stop, load_environments(processes, problems)) is None:
            log.info("edge node stopped before its environments were loaded")
            return
        store = ReleaseStore(settings.data_dir, identity, base, settings.releases.max_rank)
        store.clear_leftovers()
        await asyncio.to_thread(store.fit_ranks)
        experience = open_experience(settings)
        rounds = RoundStore(settings.data_dir / "learning")
        reads = rounds.reads if settings.learning.enabled else lambda: 0
        trimmer = Trimmer(settings.experience, experience, reads, problems)
        await asyncio.to_thread(trimmer.prepare)
        outbox = Outbox(settings.data_dir / "outbox", settings.outbox.approval)
        socket = control_socket(settings.data_dir)
        probation = Probation(settings, store)
        vllm = VllmProcess(settings, base, socket, ended=probation.ended)
        learner = LearnerProcess(settings)

        def counts() -> fleet_pb2.NodeStatus:
            states: list[str] = [entry.state for entry in outbox.list()]
            kept = experience.counts()
            return fleet_pb2.NodeStatus(
                outbox_waiting=states.count("waiting"),
                outbox_held=states.count("held"),
                experiences=kept.examples,
                unusable_experiences=kept.unusable,
                max_release_rank=settings.releases.max_rank or 0,
            )

        async with identity.channel(settings) as channel:
            control = ControlClient(socket)
            uploader = Uploader(outbox, channel, identity, settings)
            environments = {
                process.spec.name: (process.spec, process.environment) for process in processes
            }
            evaluator = Evaluator(
                control.requests,
                environments,
                evaluation_seed(identity.node_id),
                settings.releases.max_answer_tokens,
                partial(read_rules, settings, base.path, settings.releases.max_answer_tokens),
                control,
            )
            watcher = ReleaseWatcher(
                settings,
                channel,
                store,
                vllm,
                control,
                evaluator,
                counts,
                lambda: open_starts(settings.data_dir),
                proof=make_proof(settings, base, store, control),
                probation=probation,
            )
            log.info(
                "edge node starts", extra={"node_id": identity.node_id, "cohort": identity.cohort}
            )
            problems.clear("node")
            rooms = [
                vllm.run(),
                watcher.run(),
                uploader.run(),
                look_around(settings.data_dir, identity),
                trimmer.run(),
                tell(
                    Gatherer(settings.data_dir, identity, vllm, outbox, experience).families,
                    control,
                ),
            ]
            if settings.learning.enabled:
                rooms.append(learner.run())
            tasks = [asyncio.create_task(room) for room in rooms]
            stopped = asyncio.create_task(stop.wait())
            try:
                done, _ = await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
                for task in [
                    task for task in tasks if task in done
                ]:  # vLLM's own error before what follows from it
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
