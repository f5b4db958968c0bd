"""Sign of life of the supervisor, for probes.

In: the data directory. Out: a file whose time of change advances while the supervisor's event loop
turns, and its age. Imports nothing heavy, because a probe runs often.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from edge_node.errors import EdgeError
from edge_node.problems import Problems

FILE_NAME = "supervisor.alive"
INTERVAL_S = 5.0
SILENCE_S = 60.0
"""A supervisor that was silent for longer hangs: nothing in its event loop takes this long."""


async def beat(data_dir: Path) -> None:
    """Touch the file until cancelled."""
    problems = Problems(data_dir)
    while True:
        try:
            (data_dir / FILE_NAME).touch()
            problems.clear("heartbeat")
        except (
            OSError
        ) as error:  # a full disk must not make a supervisor look dead that later recovers
            text = (
                f"The sign of life {data_dir / FILE_NAME} cannot be written: {error.strerror}. "
                "Probes will restart this node."
            )
            problems.report(
                "heartbeat", text, "Check the disk of EDGE_DATA_DIR: its space and permissions."
            )
        await asyncio.sleep(INTERVAL_S)


def check_alive(data_dir: Path, now: float | None = None) -> float:
    """Seconds since the last beat; raises EdgeError without one or when it is over SILENCE_S."""
    try:
        age_s = (time.time() if now is None else now) - (data_dir / FILE_NAME).stat().st_mtime
    except OSError as error:
        raise EdgeError(
            f"No supervisor has run on {data_dir}. Start it with `edge-node serve`."
        ) from error
    if age_s > SILENCE_S:
        raise EdgeError(
            f"The supervisor on {data_dir} was last alive {age_s:.0f} s ago; expected at most "
            f"{SILENCE_S:.0f} s. Restart it."
        )
    return age_s


def is_alive(data_dir: Path) -> bool:
    """Whether a supervisor has run there within SILENCE_S."""
    try:
        check_alive(data_dir)
    except EdgeError:
        return False
    return True
