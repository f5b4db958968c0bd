"""`edge-node status` and `edge-node doctor`: what the node is doing, and what keeps it from it.

In: settings. Out: plain values and checks, each with what was seen and the next step. Changes
nothing, but remembers what it found of the base.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509

from edge_node.access import describe_access
from edge_node.base_model import check_base, read_base
from edge_node.capture import load_redactor
from edge_node.environments import EnvironmentProcess
from edge_node.errors import (
    CentralUnreachable,
    EdgeError,
    EnrollmentError,
    ServingError,
    SettingsError,
    StorageError,
)
from edge_node.experience import Counts, describe_experience, open_experience
from edge_node.heartbeat import is_alive
from edge_node.identity import Identity, clock_advice
from edge_node.learning.anchors import read_anchors, summary
from edge_node.outbox import Outbox
from edge_node.problems import Problem, Problems
from edge_node.releases.probation import avoided_releases
from edge_node.releases.store import ReleaseStore
from edge_node.rounds import newest_round
from edge_node.serving import (
    ControlClient,
    ControlState,
    control_socket,
    is_listening,
    port_problem,
    socket_problem,
    start_problem,
)
from edge_node.settings import EdgeSettings
from edge_node.sizing import describe
from edge_node.status import engine_status, kept_status
from edge_node.surroundings import LOW_DISK_BYTES, expect_same_time, surroundings
from protos.releases.v1 import releases_pb2, releases_pb2_grpc

STATE_TIMEOUT_S = 1.0
"""Status answers at once, also when vLLM does not."""
STORE_TIMEOUT_S = 0.3
"""Nor when another process, perhaps a person's `sqlite3`, keeps a store to itself."""
SILENCE_S = 15.0
"""Longer than a probe waits behind the prefill of other requests."""
COUNTED = {
    "unusable_examples" if one.name == "unusable" else one.name: one.name for one in fields(Counts)
}
"""Name in status -> name in Counts."""
KEPT = ("feedback_waiting", "by_environment", "experience_mib", "removed")
"""What else status says of the experience. removed: answers that retention took out."""


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    text: str


async def node_status(settings: EdgeSettings) -> dict[str, Any]:
    """One record; raises EnrollmentError when the node is not enrolled.

    `not_ready` says why the node gets no traffic; it is None when it does. `problems` names what
    else fails, one a room.
    """
    identity, unreadable = _identity(settings.data_dir)
    status: dict[str, Any] = {
        "node_id": identity and identity.node_id,
        "cohort": identity and identity.cohort,
        **await asyncio.to_thread(_releases, settings, identity, unreadable),
        "ready": False,
        **_stored(settings, unreadable),
        **await asyncio.to_thread(kept_status, settings, busy_timeout_s=STORE_TIMEOUT_S),
    }
    try:
        state = await _serving_state(settings)
    except ServingError as error:
        return (
            status
            | engine_status(settings, None)
            | {
                "not_ready": str(error),
                "problems": _problems(settings.data_dir, identity, unreadable),
            }
        )
    not_ready = state.not_ready
    if not_ready is None and not await is_listening(settings.serving):
        not_ready = f"Nothing listens at {settings.serving.host}:{settings.serving.port}."
    return (
        status
        | engine_status(settings, state)
        | {
            "ready": not_ready is None,
            "serving": state.target,
            "canary": state.canary,
            "own_adapter": state.own,
            "versions": state.versions,
            "loaded": sorted(state.loaded),
            "captured": state.captured,
            "lost": state.lost,
            "not_ready": not_ready,
            "problems": _problems(settings.data_dir, identity, [*unreadable, *state.problems]),
        }
    )


def _problems(
    data_dir: Path, identity: Identity | None, unwritten: list[Problem]
) -> list[dict[str, str]]:
    """The problems on file, `unwritten` ones, and those seen now: a full disk keeps no file."""
    found = {problem.room: problem for problem in [*Problems(data_dir).current(), *unwritten]}
    for room, wrong in surroundings(data_dir, identity) if identity else ():
        known = found.pop(room, None)
        if wrong is not None:
            since = known.since if known else datetime.now(UTC).isoformat(timespec="seconds")
            found[room] = Problem(room, *wrong, since)
    return [asdict(found[room]) for room in sorted(found)]


def _identity(data_dir: Path) -> tuple[Identity | None, list[Problem]]:
    """As Identity.load, but a damaged identity is a problem, and so is a failed enrolment."""
    try:
        return Identity.load(data_dir), []
    except StorageError as error:
        return None, [_unreadable("identity", error, "Do what it says.")]
    except EnrollmentError as error:
        known = {problem.room: problem for problem in Problems(data_dir).current()}
        if (wait := known.get("enrolment")) is not None and is_alive(data_dir):
            text = (
                f"This node waits to be enrolled since {wait.since}. {wait.text} {wait.next_step}"
            )
            raise EnrollmentError(text) from error
        ended = [known["node"].text] if "node" in known else []
        raise EnrollmentError(" ".join([str(error), *ended])) from error


def _releases(
    settings: EdgeSettings, identity: Identity | None, unreadable: list[Problem]
) -> dict[str, Any]:
    """What is active, and why updates are kept aside. What cannot be read is a problem."""
    known: dict[str, Any] = {"active_release": None, "quarantine": None}
    known["avoided_releases"] = sorted(avoided_releases(settings.data_dir))
    if identity is None:
        return known
    try:
        store = ReleaseStore(
            settings.data_dir, identity, read_base(settings), settings.releases.max_rank
        )
    except (SettingsError, StorageError) as error:
        unreadable.append(_unreadable("releases", error, "Do what it says."))
        return known
    try:
        known["quarantine"] = store.quarantine() or None
    except StorageError as error:
        unreadable.append(_unreadable("quarantine", error, "Do what it says."))
    try:
        active = store.active()
        known["active_release"] = active.label if active else None
    except StorageError as error:
        unreadable.append(_unreadable("releases", error, "Do what it says."))
    return known


def _stored(settings: EdgeSettings, unreadable: list[Problem]) -> dict[str, Any]:
    """What the stores hold. A store that cannot be opened is a problem; the rest is shown."""
    held: dict[str, Any] = dict.fromkeys((*COUNTED, *KEPT, "outbox", "last_round", "round"))
    step = "Check the disk of EDGE_DATA_DIR: its space and permissions."
    try:
        experience = open_experience(settings, busy_timeout_s=STORE_TIMEOUT_S)
        counts = experience.counts()
        held |= {shown: getattr(counts, name) for shown, name in COUNTED.items()}
        held["feedback_waiting"] = experience.waiting()
        held["by_environment"] = {
            kinds.environment or "-": {"interactions": kinds.interactions, **kinds.feedback}
            for kinds in experience.by_environment()
        }
        held["experience_mib"] = round(experience.held_bytes() / (1 << 20), 1)
        held["removed"] = experience.removed()
    except (SettingsError, StorageError, sqlite3.Error) as error:
        unreadable.append(_unreadable("experience", error, f"Do what it says. {step}"))
    try:
        outbox = Outbox(
            settings.data_dir / "outbox", settings.outbox.approval, busy_timeout_s=STORE_TIMEOUT_S
        )
        states = [str(entry.state) for entry in outbox.list()]
        held["outbox"] = {state: states.count(state) for state in sorted(set(states))}
    except (StorageError, sqlite3.Error, ValueError) as error:  # ValueError: no such state
        unreadable.append(_unreadable("outbox", error, step))
    try:
        held |= newest_round(settings.data_dir, busy_timeout_s=STORE_TIMEOUT_S)
    except (StorageError, sqlite3.Error, ValueError) as error:  # ValueError: no such plan
        unreadable.append(_unreadable("rounds", error, f"Do what it says. {step}"))
    return held


def _unreadable(room: str, error: Exception, step: str) -> Problem:
    return Problem(room, str(error), step, datetime.now(UTC).isoformat(timespec="seconds"))


async def run_checks(settings: EdgeSettings) -> list[Check]:
    """Every check, in the order in which a new node needs them."""
    known = Check("settings", True, "every EDGE_* variable is known and valid")
    return [known, *[await run_check(name, settings) for name in CHECKS]]


async def run_check(name: str, settings: EdgeSettings) -> Check:
    """The check of that name in CHECKS."""
    try:
        return Check(name, True, await CHECKS[name](settings))
    except EdgeError as error:
        return Check(name, False, str(error))
    except (OSError, sqlite3.Error) as error:
        return Check(name, False, f"{type(error).__name__}: {error}. Check EDGE_DATA_DIR.")


async def _check_disk(settings: EdgeSettings) -> str:
    folder = settings.data_dir
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(
            f"{folder} is not a writable directory. Set EDGE_DATA_DIR to one that is."
        )
    free = shutil.disk_usage(folder).free
    if free < LOW_DISK_BYTES:
        raise StorageError(
            f"{free >> 20} MiB free at {folder}; expected at least {LOW_DISK_BYTES >> 20}. Free "
            "some room."
        )
    if problem := socket_problem(folder / "control.sock"):
        raise StorageError(problem)
    return f"{settings.data_dir} is writable, {free >> 30} GiB free"


async def _check_base(settings: EdgeSettings) -> str:
    base = await asyncio.to_thread(check_base, settings)
    try:
        identity = Identity.load(settings.data_dir)
    except EnrollmentError:
        return f"digest {base.digest[:12]}, {len(base.module_shapes)} linear modules"
    if identity.base != base.digest:
        raise SettingsError(
            f"digest {base.digest[:12]}, but this node was enrolled with base "
            f"{identity.base[:12]}. Point EDGE_BASE__PATH at that model, or enrol a new node."
        )
    return f"digest {base.digest[:12]} is the one this node was enrolled with"


async def _check_learning(settings: EdgeSettings) -> str:
    if not settings.learning.enabled:
        return "off: the node serves and evaluates"
    return await asyncio.to_thread(describe, settings, read_base(settings))


async def _check_environments(settings: EdgeSettings) -> str:
    names, protected = [], False
    for spec in settings.environments:
        with EnvironmentProcess(spec) as process:
            kind = await asyncio.to_thread(process.start)
        kinds = [kind] * (kind != "tasks") + ["anchor"] * spec.anchor
        names.append(f"{spec.name} ({', '.join(kinds)})" if kinds else spec.name)
        protected |= spec.anchor and kind == "tasks"
    found = ", ".join(names) or "none"
    if settings.learning.enabled and not protected:
        missing = (
            "rounds will not protect what the base could do"
            if settings.learning.anchors is None
            else "the gate will not measure what the base could do"
        )
        return f"{found}; no anchor of tasks: {missing}"
    return found


async def _check_anchors(settings: EdgeSettings) -> str:
    path = settings.learning.anchors
    if path is None:
        return "EDGE_LEARNING__ANCHORS is not set; rounds learn from anchor environments, if any"
    base = await asyncio.to_thread(read_base, settings)
    anchors = await asyncio.to_thread(read_anchors, path, base.digest)
    return f"{summary(anchors.samples)} by this base, in {path}"


async def _check_certificate(settings: EdgeSettings) -> str:
    identity = Identity.load(settings.data_dir)
    if (advice := clock_advice("", identity.certificate_pem)) is not None:
        raise EnrollmentError(advice)
    ends = x509.load_pem_x509_certificate(identity.certificate_pem).not_valid_after_utc
    key = Path(settings.data_dir, "identity", "node.key")
    if key.stat().st_mode & 0o077:
        raise StorageError(
            f"{key} can be read by others (mode {key.stat().st_mode & 0o777:o}). Run chmod 600 on "
            "it."
        )
    return f"{identity.node_id}, cohort {identity.cohort}, until {ends:%Y-%m-%d}"


async def _check_central(settings: EdgeSettings) -> str:
    identity = Identity.load(settings.data_dir)
    async with identity.channel(settings) as channel:
        try:
            answer = await releases_pb2_grpc.ReleaseServiceStub(channel).GetHead(
                releases_pb2.GetHeadRequest(channel=settings.releases.channel),
                timeout=min(10, settings.central.call_timeout_s),
            )
        except grpc.aio.AioRpcError as error:
            advice = clock_advice(error.details() or "", identity.certificate_pem) or (
                "Check EDGE_CENTRAL__ADDRESS, the network, and that this node is not revoked "
                "(`central nodes`)."
            )
            raise CentralUnreachable(
                f"{settings.central.address}: {error.code().name}: {error.details()}. {advice}"
            ) from error
    expect_same_time(answer.unix_time_s, time.time())
    store = ReleaseStore(
        settings.data_dir,
        identity,
        await asyncio.to_thread(read_base, settings),
        settings.releases.max_rank,
    )
    head = store.check(answer.head).label
    return f"{settings.central.address} answers; {settings.releases.channel} is {head}"


async def _check_endpoint(settings: EdgeSettings) -> str:
    place = f"{settings.serving.host}:{settings.serving.port}"
    try:
        state = await _serving_state(settings)
    except ServingError as error:
        if problem := start_problem(settings.serving):
            raise ServingError(problem) from error
        if (problem := port_problem(settings.serving)) is None:
            return f"{place} is free; run `edge-node serve`"
        if is_alive(settings.data_dir):
            raise ServingError(f"The node runs but does not serve: {error}") from error
        raise ServingError(problem) from error
    if state.not_ready is not None:
        raise ServingError(f"The node runs but is not ready: {state.not_ready}")
    if not await is_listening(settings.serving):
        raise ServingError(
            f"The node runs, but not at {place}. Use the EDGE_* variables that it was started with."
        )
    return f"serving on {place}"


async def _check_access(settings: EdgeSettings) -> str:
    return describe_access(settings)


async def _check_experience(settings: EdgeSettings) -> str:
    load_redactor(settings.capture.redaction)
    return await asyncio.to_thread(describe_experience, settings, busy_timeout_s=STORE_TIMEOUT_S)


async def _serving_state(settings: EdgeSettings) -> ControlState:
    """What vLLM says of itself; raises ServingError, also for an engine that makes no tokens."""
    state = await ControlClient(
        control_socket(settings.data_dir), timeout_s=STATE_TIMEOUT_S
    ).state()
    if state.silent_s > SILENCE_S:
        raise ServingError(
            f"vLLM's engine has made no token for {state.silent_s:.0f} s. The supervisor starts an "
            "engine that hangs again within minutes; see logs/vllm.log."
        )
    return state


CHECKS: dict[str, Callable[[EdgeSettings], Awaitable[str]]] = {
    "disk": _check_disk,
    "base": _check_base,
    "learning": _check_learning,
    "environments": _check_environments,
    "anchors": _check_anchors,
    "certificate": _check_certificate,
    "central": _check_central,
    "endpoint": _check_endpoint,
    "access": _check_access,
    "experience": _check_experience,
}
"""In the order in which a new node needs them."""
