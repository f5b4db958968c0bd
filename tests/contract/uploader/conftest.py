"""An outbox, in a directory of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_node.outbox import Outbox


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings' data directory, where problems are kept, is relative."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path, "auto")
