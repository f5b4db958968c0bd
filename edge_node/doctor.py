"""`edge-node status` and `edge-node doctor`: what the node is doing, and what keeps it from it.

In: settings. Out: plain values and checks, each with what was seen and the next step. Changes nothing.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sqlite3
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import httpx
from cryptography import x509

from edge_node.environments import load_environment
from edge_node.errors import CentralUnreachable, EdgeError, EnrollmentError, ServingError, SettingsError, StorageError
from edge_node.experience import ExperienceStore
from edge_node.identity import Identity, clock_advice
from edge_node.main import control_socket, read_base
from edge_node.outbox import Outbox
from edge_node.releases.store import ReleaseStore
from edge_node.serving import ControlClient
from edge_node.settings import EdgeSettings
from protos.releases.v1 import releases_pb2, releases_pb2_grpc

LOW_DISK_BYTES = 2 << 30
MAX_CLOCK_DIFFERENCE_S = 60


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    text: str


async def node_status(settings: EdgeSettings) -> dict[str, Any]:
    """One flat record; raises EnrollmentError when the node is not enrolled."""
    identity = Identity.load(settings.data_dir)
    store = ReleaseStore(
        settings.data_dir, identity, await asyncio.to_thread(read_base, settings), settings.releases.max_rank
    )
    active = store.active()
    outbox = [str(entry.state) for entry in Outbox(settings.data_dir / "outbox", settings.outbox.approval).list()]
    counts = ExperienceStore(settings.data_dir / "experience.db").counts()
    status: dict[str, Any] = {
        "node_id": identity.node_id,
        "cohort": identity.cohort,
        "active_release": active.label if active else None,
        "quarantine": store.quarantine() or None,
        "ready": False,
        "interactions": counts.interactions,
        "feedback": counts.feedback,
        "examples": counts.examples,
        "outbox": {state: outbox.count(state) for state in sorted(set(outbox))},
    }
    try:
        state = await ControlClient(control_socket(settings.data_dir)).state()
    except ServingError as error:
        return status | {"problem": str(error)}
    return status | {
        "ready": state.not_ready is None and await _is_ready(settings),
        "serving": state.target,
        "loaded": sorted(state.loaded),
        "captured": state.captured,
        "lost": state.lost,
        "problem": state.not_ready,
    }


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
    return f"{settings.data_dir} is writable, {free >> 30} GiB free"


async def _check_base(settings: EdgeSettings) -> str:
    base = await asyncio.to_thread(read_base, settings)
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
    serving = settings.serving
    if await _is_ready(settings):
        return f"serving on {serving.host}:{serving.port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.host, serving.port))
        except OSError as error:
            raise ServingError(
                f"{serving.host}:{serving.port} is taken but not by a ready node ({error.strerror}). "
                "Free it or set EDGE_SERVING__PORT."
            ) from error
    return f"{serving.host}:{serving.port} is free; run `edge-node serve`"


async def _is_ready(settings: EdgeSettings) -> bool:
    async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
        try:
            return (await client.get(f"{settings.serving.url}/ready")).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False
