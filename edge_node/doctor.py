"""`edge-node status` and `edge-node doctor`: what the node is doing, and what keeps it from it.

In: settings. Out: plain values and checks, each with what was seen and the next step. Changes nothing, but remembers what it found of the base.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509

from edge_node.base_model import check_base, read_base
from edge_node.environments import load_environment
from edge_node.errors import CentralUnreachable, EdgeError, EnrollmentError, ServingError, SettingsError, StorageError
from edge_node.experience import ExperienceStore
from edge_node.heartbeat import check_alive
from edge_node.identity import Identity, clock_advice
from edge_node.main import control_socket
from edge_node.outbox import Outbox
from edge_node.problems import Problem, Problems
from edge_node.releases.store import ReleaseStore
from edge_node.serving import ControlClient, ControlState, is_listening, port_problem, socket_problem, start_problem
from edge_node.settings import EdgeSettings
from edge_node.surroundings import LOW_DISK_BYTES, surroundings
from protos.releases.v1 import releases_pb2, releases_pb2_grpc

MAX_CLOCK_DIFFERENCE_S = 60
STATE_TIMEOUT_S = 1.0
"""Status answers at once, also when vLLM does not."""
STORE_TIMEOUT_S = 0.3
"""Nor when another process, perhaps a person's `sqlite3`, keeps a store to itself."""
SILENCE_S = 15.0
"""Longer than a probe waits behind the prefill of other requests."""


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    text: str


async def node_status(settings: EdgeSettings) -> dict[str, Any]:
    """One record; raises EnrollmentError when the node is not enrolled.

    `not_ready` says why the node gets no traffic, None when it does; `problems` what fails besides, one a room.
    """
    identity = _identity(settings.data_dir)
    store = ReleaseStore(
        settings.data_dir, identity, await asyncio.to_thread(read_base, settings), settings.releases.max_rank
    )
    active = store.active()
    stored, unreadable = _stored(settings)
    status: dict[str, Any] = {
        "node_id": identity.node_id,
        "cohort": identity.cohort,
        "active_release": active.label if active else None,
        "quarantine": store.quarantine() or None,
        "ready": False,
        **stored,
    }
    try:
        state = await _serving_state(settings)
    except ServingError as error:
        return status | {"not_ready": str(error), "problems": _problems(settings.data_dir, identity, unreadable)}
    not_ready = state.not_ready
    if not_ready is None and not await is_listening(settings.serving):
        not_ready = f"Nothing listens at {settings.serving.host}:{settings.serving.port}."
    return status | {
        "ready": not_ready is None,
        "serving": state.target,
        "loaded": sorted(state.loaded),
        "captured": state.captured,
        "lost": state.lost,
        "not_ready": not_ready,
        "problems": _problems(settings.data_dir, identity, [*unreadable, *state.problems]),
    }


def _problems(data_dir: Path, identity: Identity, unwritten: list[Problem]) -> list[dict[str, str]]:
    """Those on file, those that are on no file, and what can be seen from here: on a full disk no file tells."""
    found = {problem.room: problem for problem in [*Problems(data_dir).current(), *unwritten]}
    for room, wrong in surroundings(data_dir, identity):
        known = found.pop(room, None)
        if wrong is not None:
            since = known.since if known else datetime.now(UTC).isoformat(timespec="seconds")
            found[room] = Problem(room, *wrong, since)
    return [asdict(found[room]) for room in sorted(found)]


def _identity(data_dir: Path) -> Identity:
    """As Identity.load, but of a node that could not be enrolled so far it says why: `serve` enrols too."""
    try:
        return Identity.load(data_dir)
    except EnrollmentError as error:
        known = {problem.room: problem for problem in Problems(data_dir).current()}
        if (wait := known.get("enrolment")) is not None and _is_alive(data_dir):
            text = f"This node waits to be enrolled since {wait.since}. {wait.text} {wait.next_step}"
            raise EnrollmentError(text) from error
        ended = [known["node"].text] if "node" in known else []
        raise EnrollmentError(" ".join([str(error), *ended])) from error


def _stored(settings: EdgeSettings) -> tuple[dict[str, Any], list[Problem]]:
    """What the stores hold. A store that cannot be opened (full disk) does not hide the rest: it is a problem."""
    held: dict[str, Any] = dict.fromkeys(("interactions", "feedback", "examples", "unusable_examples", "outbox"))
    unreadable = []
    now = datetime.now(UTC).isoformat(timespec="seconds")
    step = "Check the disk of EDGE_DATA_DIR: its space and permissions."
    try:
        counts = ExperienceStore(settings.data_dir / "experience.db", busy_timeout_s=STORE_TIMEOUT_S).counts()
        held |= {"interactions": counts.interactions, "feedback": counts.feedback, "examples": counts.examples}
        held["unusable_examples"] = dict(counts.unusable)
    except StorageError as error:
        unreadable.append(Problem("experience", str(error), step, now))
    try:
        outbox = Outbox(settings.data_dir / "outbox", settings.outbox.approval, busy_timeout_s=STORE_TIMEOUT_S)
        states = [str(entry.state) for entry in outbox.list()]
        held["outbox"] = {state: states.count(state) for state in sorted(set(states))}
    except StorageError as error:
        unreadable.append(Problem("outbox", str(error), step, now))
    return held, unreadable


async def run_checks(settings: EdgeSettings) -> list[Check]:
    """Every check, in the order in which a new node needs them."""
    checks: list[tuple[str, Callable[[EdgeSettings], Awaitable[str]]]] = [
        ("disk", _check_disk),
        ("base", _check_base),
        ("environments", _check_environments),
        ("certificate", _check_certificate),
        ("central", _check_central),
        ("endpoint", _check_endpoint),
    ]
    results = [Check("settings", True, "every EDGE_* variable is known and valid")]
    for name, check in checks:
        try:
            results.append(Check(name, True, await check(settings)))
        except EdgeError as error:
            results.append(Check(name, False, str(error)))
        except (OSError, sqlite3.Error) as error:
            results.append(Check(name, False, f"{type(error).__name__}: {error}. Check EDGE_DATA_DIR."))
    return results


async def _check_disk(settings: EdgeSettings) -> str:
    folder = settings.data_dir
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{folder} is not a writable directory. Set EDGE_DATA_DIR to one that is.")
    free = shutil.disk_usage(folder).free
    if free < LOW_DISK_BYTES:
        raise StorageError(
            f"{free >> 20} MiB free at {folder}; expected at least {LOW_DISK_BYTES >> 20}. Free some room."
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
            f"digest {base.digest[:12]}, but this node was enrolled with base {identity.base[:12]}. "
            "Point EDGE_BASE__PATH at that model, or enrol a new node."
        )
    return f"digest {base.digest[:12]} is the one this node was enrolled with"


async def _check_environments(settings: EdgeSettings) -> str:
    for spec in settings.environments:
        load_environment(spec)
    names = ", ".join(spec.name + (" (anchor)" if spec.anchor else "") for spec in settings.environments)
    if settings.learning.enabled and not any(spec.anchor for spec in settings.environments):
        return f"{names or 'none'}; no anchor: rounds will not protect what the base could do"
    return names or "none"


async def _check_certificate(settings: EdgeSettings) -> str:
    identity = Identity.load(settings.data_dir)
    if (advice := clock_advice("", identity.certificate_pem)) is not None:
        raise EnrollmentError(advice)
    ends = x509.load_pem_x509_certificate(identity.certificate_pem).not_valid_after_utc
    key = Path(settings.data_dir, "identity", "node.key")
    if key.stat().st_mode & 0o077:
        raise StorageError(f"{key} can be read by others (mode {key.stat().st_mode & 0o777:o}). Run chmod 600 on it.")
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
                "Check EDGE_CENTRAL__ADDRESS, the network, and that this node is not revoked (`central nodes`)."
            )
            raise CentralUnreachable(
                f"{settings.central.address}: {error.code().name}: {error.details()}. {advice}"
            ) from error
    expect_same_time(answer.unix_time_s, time.time())
    store = ReleaseStore(
        settings.data_dir, identity, await asyncio.to_thread(read_base, settings), settings.releases.max_rank
    )
    return f"{settings.central.address} answers; {settings.releases.channel} is {store.check(answer.head).label}"


def expect_same_time(central_s: int, node_s: float) -> None:
    """Raises SettingsError when the clocks of central and node, in seconds since 1970, are far apart."""
    if abs(node_s - central_s) > MAX_CLOCK_DIFFERENCE_S:
        node, central = (datetime.fromtimestamp(seconds, UTC) for seconds in (node_s, central_s))
        raise SettingsError(
            f"This node's clock says {node:%Y-%m-%d %H:%M:%S} UTC, central's says {central:%Y-%m-%d %H:%M:%S}. Expected at most "
            f"{MAX_CLOCK_DIFFERENCE_S} s between them: certificates and times in reports would be wrong. Set the clock that is wrong."
        )


async def _check_endpoint(settings: EdgeSettings) -> str:
    place = f"{settings.serving.host}:{settings.serving.port}"
    try:
        state = await _serving_state(settings)
    except ServingError as error:
        if problem := start_problem(settings.serving):
            raise ServingError(problem) from error
        if (problem := port_problem(settings.serving)) is None:
            return f"{place} is free; run `edge-node serve`"
        if _is_alive(settings.data_dir):
            raise ServingError(f"The node runs but does not serve: {error}") from error
        raise ServingError(problem) from error
    if state.not_ready is not None:
        raise ServingError(f"The node runs but is not ready: {state.not_ready}")
    if not await is_listening(settings.serving):
        raise ServingError(f"The node runs, but not at {place}. Use the EDGE_* variables that it was started with.")
    return f"serving on {place}"


async def _serving_state(settings: EdgeSettings) -> ControlState:
    """What vLLM says of itself; raises ServingError, also for an engine that makes no tokens."""
    state = await ControlClient(control_socket(settings.data_dir), timeout_s=STATE_TIMEOUT_S).state()
    if state.silent_s > SILENCE_S:
        raise ServingError(
            f"vLLM's engine has made no token for {state.silent_s:.0f} s. The supervisor starts an "
            "engine that hangs again within minutes; see logs/vllm.log."
        )
    return state


def _is_alive(data_dir: Path) -> bool:
    """Has a supervisor run here within the last minute?"""
    try:
        check_alive(data_dir)
    except EdgeError:
        return False
    return True
