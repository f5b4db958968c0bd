"""A central that was prepared, and one backup of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.contract.backup.builders import Prepared, prepare, process


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return asyncio.run(prepare(tmp_path_factory.mktemp("prepared")))


@pytest.fixture(scope="session")
def backups(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one backup; copied by whoever changes it."""
    directory = tmp_path_factory.mktemp("backups") / "of-central"
    done = process(prepared.settings, "backup", str(directory))
    assert done.returncode == 0, done.stderr
    return directory
