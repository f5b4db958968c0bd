"""A central whose journal a test may spoil, and its commands."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.contract import central_harness as harness
from tests.contract.lost.befalls import Prepared


async def prepare(folder: Path) -> Prepared:
    settings = harness.make_settings(folder)
    async with harness.running_central(settings) as central:
        token = await central.token()
        nodes = [await central.enroll(name, token) for name in ("a", "b", "c", "d")]
        for number, node in enumerate(nodes[:2]):
            await node.upload(harness.encode_factors(number))
        old = folder / "old.db"
        with (
            sqlite3.connect(settings.data_dir / "journal.db") as source,
            sqlite3.connect(old) as target,
        ):
            source.backup(target)
        for number, node in enumerate(nodes[2:], 2):
            await node.upload(harness.encode_factors(number))
    return Prepared(settings, old)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return asyncio.run(prepare(tmp_path_factory.mktemp("original")))


@pytest.fixture
def data(original: Prepared, tmp_path: Path) -> Path:
    """A copy of the data directory that the test may spoil."""
    return Path(shutil.copytree(original.settings.data_dir, tmp_path / "central"))
