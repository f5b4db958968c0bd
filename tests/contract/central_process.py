"""`central` as a process of its own, and what a test sees of it from outside.

In: settings of a central. Out: the running process; its services as a `Central`.
Guarantees: the process is gone when its block ends.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from central.fleet.pki import Pki
from central.settings import CentralSettings
from protos.base import read_base_model
from tests.contract import central_harness as harness

ROOT = Path(__file__).resolve().parents[2]
MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""As central's image and chart set them: a flood then takes little memory."""


@asynccontextmanager
async def process(
    settings: CentralSettings, *arguments: str, files: int = 0, **more: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`central` with these arguments; `more` are settings by the rest of their names.

    files: how many the process may open at most; 0: as many as this one.
    """
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("CENTRAL_")
    }
    environment |= {
        "CENTRAL_DATA_DIR": str(settings.data_dir),
        "CENTRAL_BASE__PATH": str(settings.base.path),
        "CENTRAL_LISTEN__PORT": str(settings.listen.port),
        "CENTRAL_LISTEN__ENROLLMENT_PORT": str(settings.listen.enrollment_port),
        "CENTRAL_MERGE__MIN_UPDATES": "99",
        "CENTRAL_RETENTION__SUPERSEDED_DAYS": str(settings.retention.superseded_days),
        **MALLOC,
        **{f"CENTRAL_{name}": value for name, value in more.items()},
    }
    limited = ["bash", "-c", f'ulimit -n {files} && exec "$@"', "central"] if files else []
    running = await asyncio.create_subprocess_exec(
        *limited, sys.executable, "-m", "central.cli", *arguments,
        cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


async def ready(running: asyncio.subprocess.Process) -> None:
    assert running.stdout is not None
    line = (await asyncio.wait_for(running.stdout.readline(), 60)).decode()
    assert line.startswith("central is ready on "), line


@asynccontextmanager
async def outside(settings: CentralSettings) -> AsyncIterator[harness.Central]:
    """The process seen from outside: only its certificates are read."""

    class Seen:
        pki = Pki.load_or_create(settings.data_dir, [])
        base = read_base_model(settings.base.path or Path())

    async with AsyncExitStack() as stack:
        yield harness.Central(Seen(), settings, stack)  # type: ignore[arg-type]
