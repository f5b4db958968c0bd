"""What no room of the node looks after, though all need it: space on the disk, a valid certificate.

In: the data directory and the node's identity. Out: the problems of rooms `disk` and `certificate`, every PERIOD_S.
"""

from __future__ import annotations

import asyncio
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from edge_node.identity import Identity
from edge_node.problems import Problems

PERIOD_S = 10.0
LOW_DISK_BYTES = 2 << 30
NEAR_END = timedelta(days=30)


async def look_around(data_dir: Path, identity: Identity) -> None:
    """Report and clear until cancelled."""
    problems = Problems(data_dir)
    while True:
        for room, wrong in await asyncio.to_thread(surroundings, data_dir, identity):
            if wrong is None:
                problems.clear(room)
            else:
                problems.report(room, *wrong)
        await asyncio.sleep(PERIOD_S)


def surroundings(
    data_dir: Path, identity: Identity, now: datetime | None = None
) -> list[tuple[str, tuple[str, str] | None]]:
    """Room, and its text and next step; None where nothing is wrong."""
    return [("disk", _disk(data_dir)), ("certificate", _certificate(identity, now or datetime.now(UTC)))]


def _disk(data_dir: Path) -> tuple[str, str] | None:
    try:
        free = shutil.disk_usage(data_dir).free
    except OSError as error:
        return f"{data_dir} cannot be looked at: {error.strerror}.", "Check that the disk of EDGE_DATA_DIR is there."
    if free >= LOW_DISK_BYTES:
        return None
    return (
        f"{free >> 20} MiB free at {data_dir}; expected at least {LOW_DISK_BYTES >> 20}.",
        "Free some room, or give EDGE_DATA_DIR a larger disk: a full one loses what is to be learnt.",
    )


def _certificate(identity: Identity, now: datetime) -> tuple[str, str] | None:
    ends = x509.load_pem_x509_certificate(identity.certificate_pem).not_valid_after_utc
    if ends - now >= NEAR_END:
        return None
    what = "ended" if ends < now else "ends"
    return (
        f"The certificate of {identity.node_id} {what} on {ends:%Y-%m-%d}; central refuses this node from then on.",
        "Get a join token (`central tokens create`), stop the node, remove identity/identity.json in EDGE_DATA_DIR and run "
        "`edge-node enroll` with it: key and name stay.",
    )
