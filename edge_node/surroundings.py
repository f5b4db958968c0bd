"""What no room of the node looks after, though all need it: space on the disk, a valid certificate.

In: the data directory and the node's identity. Out: the problems of rooms `disk` and
`certificate`, every PERIOD_S. `doctor` compares the clocks too. Room of last resort is kept on the
disk: the node and its vLLM start in it when something else has filled the rest.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from datetime import UTC, datetime
from pathlib import Path

from edge_node.certificate import certificate_problem
from edge_node.errors import SettingsError
from edge_node.identity import Identity
from edge_node.problems import Problems
from lorikeet import ballast

log = logging.getLogger(__name__)

PERIOD_S = 10.0
LOW_DISK_BYTES = 2 << 30
MAX_CLOCK_DIFFERENCE_S = 60


async def look_around(data_dir: Path, identity: Identity) -> None:
    """Report and clear until cancelled."""
    problems = Problems(data_dir)
    while True:
        for room, wrong in await asyncio.to_thread(surroundings, data_dir, identity):
            if wrong is None:
                problems.clear(room)
            else:
                problems.report(room, *wrong)
        await asyncio.to_thread(keep_room, data_dir)
        await asyncio.sleep(PERIOD_S)


def give_room(data_dir: Path) -> None:
    """Before a start: what it writes may find the disk full. Idempotent, never raises."""
    try:
        ballast.give_back(data_dir)
    except OSError as error:
        log.warning("no room given back", extra={"cause": str(error)})


def keep_room(data_dir: Path) -> None:
    """Keep room for the next start, as much as there is. Idempotent, never raises."""
    try:
        disk = shutil.disk_usage(data_dir)
        ballast.take(data_dir, total=disk.total, free=disk.free)
    except OSError as error:
        log.debug("no room for the next start", extra={"cause": str(error)})


def surroundings(
    data_dir: Path, identity: Identity, now: datetime | None = None
) -> list[tuple[str, tuple[str, str] | None]]:
    """Room, and its text and next step; None where nothing is wrong."""
    return [
        ("disk", _disk(data_dir)),
        ("certificate", certificate_problem(identity.certificate_pem, now or datetime.now(UTC))),
    ]


def _disk(data_dir: Path) -> tuple[str, str] | None:
    try:
        free = shutil.disk_usage(data_dir).free
    except OSError as error:
        return (
            f"{data_dir} cannot be looked at: {error.strerror}.",
            "Check that the disk of EDGE_DATA_DIR is there.",
        )
    if free >= LOW_DISK_BYTES:
        return None
    return (
        f"{free >> 20} MiB free at {data_dir}; expected at least {LOW_DISK_BYTES >> 20}.",
        "Free some room, or give EDGE_DATA_DIR a larger disk: a full one loses what is to be "
        "learnt.",
    )


def expect_same_time(central_s: int, node_s: float) -> None:
    """Raises SettingsError when the clocks, in seconds since 1970, are far apart."""
    if abs(node_s - central_s) > MAX_CLOCK_DIFFERENCE_S:
        node, central = (datetime.fromtimestamp(seconds, UTC) for seconds in (node_s, central_s))
        raise SettingsError(
            f"This node's clock says {node:%Y-%m-%d %H:%M:%S} UTC, central's says "
            f"{central:%Y-%m-%d %H:%M:%S}. Expected at most {MAX_CLOCK_DIFFERENCE_S} s between "
            "them: certificates and times in reports would be wrong. Set the clock that is wrong."
        )
