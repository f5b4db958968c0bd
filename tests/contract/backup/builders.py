"""A central to back up, its command as a process of its own, and what lies in a backup.

In: a folder. Out: a central with releases that does not run; files of its backups.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from central import faults
from central.blobs import DirectoryBlobs
from central.fleet.pki import Pki
from central.heads import Heads
from central.journal import Journal
from central.settings import CentralSettings
from tests.contract import central_harness as harness
from tests.contract import cohort_loop as loop
from tests.contract.central_process import ROOT


@dataclass(frozen=True)
class Prepared:
    """A central with two releases and one update that is set aside, not running, and its nodes."""

    settings: CentralSettings
    nodes: list[harness.Node]


async def prepare(folder: Path) -> Prepared:
    """Two nodes upload, their release is accepted; a third update comes too late."""
    settings = harness.make_settings(folder)
    async with harness.running_central(settings) as running:
        token = await running.token()
        nodes = [await running.enroll(name, token) for name in ("a", "b")]
        rooms = running.rooms
        seen = loop.Central(rooms.journal, rooms.blobs, rooms.registry)  # type: ignore[arg-type]
        for number, node in enumerate(nodes):
            await node.upload(harness.encode_factors(number))
        await asyncio.to_thread(
            loop.take_steps, seen, loop.make_settings(), lambda: seen.head().manifest.version == 1
        )
        late = harness.encode_factors(7)
        await nodes[0].upload(late, nodes[0].manifest(late, 2))
    return Prepared(settings, nodes)


def process(
    settings: CentralSettings, *arguments: str, fault: str = ""
) -> subprocess.CompletedProcess[str]:
    """A command of central as a process of its own, which dies at `fault` if there is one."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("CENTRAL_", faults.VARIABLE))
    }
    environment |= {
        "CENTRAL_DATA_DIR": str(settings.data_dir),
        **({faults.VARIABLE: fault} if fault else {}),
    }
    return subprocess.run(
        [sys.executable, "-m", "central.cli", *arguments], cwd=ROOT, env=environment,
        timeout=60, check=False, capture_output=True, text=True,
    )  # fmt: skip


def newest(directory: Path) -> Path:
    """The newest backup in a directory of backups."""
    return max((directory / "backups").iterdir())


def files(directory: Path) -> dict[str, bytes]:
    """Bytes of each file below, by path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def identity(node: harness.Node) -> tuple[bytes, bytes]:
    """PEM of the key and of the certificate."""
    return node.key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    ), node.answer.certificate_pem


@contextmanager
def journal_of(data: Path) -> Iterator[Journal]:
    """The journal of a central that does not run."""
    key = Pki.load_or_create(data, []).release_key
    journal = Journal(
        f"sqlite:///{data}/journal.db", seals=Heads(data, DirectoryBlobs(data / "blobs"), key)
    )
    yield journal
    journal.close()
