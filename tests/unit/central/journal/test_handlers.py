"""Every kind of event has one handler; the import of the state says so when one has none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from central.journal import EventKind
from central.journal.state.state import HANDLERS, applies, expect_all_handled

ROOT = Path(__file__).resolve().parents[4]
NEW_KIND = """
from enum import StrEnum
from central.journal import events
kinds = {kind.name: kind.value for kind in events.EventKind}
events.EventKind = StrEnum("EventKind", {**kinds, "NODE_RENAMED": "node_renamed"})
import sys
for name in [name for name in sys.modules if name.startswith("central.journal.state")]:
    del sys.modules[name]
import central.journal.state
"""


def test_a_kind_without_a_handler_fails_at_import() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", NEW_KIND], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "RuntimeError: No handler for the event kinds node_renamed." in ended.stderr


def test_a_missing_handler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(HANDLERS, EventKind.PROMOTED)
    with pytest.raises(RuntimeError, match=r"kinds promoted\. Expected a function"):
        expect_all_handled()


def test_a_second_handler_is_refused() -> None:
    with pytest.raises(RuntimeError, match="'promoted' has two handlers: promoted and "):

        @applies(EventKind.PROMOTED)
        def other(state: object, event: object) -> None: ...
