"""What status says of engine, keys, queues and the last sync; and how it looks."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest

from edge_node.access import Scope, create_key, keys_file, revoke_key
from edge_node.figures.tally import HEARD, note_heard
from edge_node.outbox import Outbox
from edge_node.serving import ControlState
from edge_node.settings import EdgeSettings
from edge_node.status import engine_status, kept_status, lines, print_status
from tests.fakes.node_data import make_node
from tests.unit.edge_node.outbox.test_outbox_store import add

V1 = "lorikeet@v1-aaaaaaaa"
STATE = ControlState(
    alias="lorikeet", base="base@0", target=V1, loaded={V1: Path("/v1")},
    in_flight={V1: 2, "policy/r1@3": 5}, captured=9, lost=0, skipped=0, draining=False,
    not_ready=None, silent_s=0.0, first_token_s=0.1, problems=[],
)  # fmt: skip
NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)


@pytest.fixture
def settings(tmp_path: Path) -> EdgeSettings:
    return make_node(tmp_path / "node")


def test_engine_and_alias(settings: EdgeSettings) -> None:
    found = engine_status(settings, STATE)
    assert found["aliases"] == {"lorikeet": V1}
    assert found["engine"] == {
        "supervisor": "away", "state": "serving", "in_flight": 2, "silent_s": 0.0,
    }  # fmt: skip
    (settings.data_dir / "supervisor.alive").touch()
    for change, word in (
        ({"not_ready": "No release is active yet."}, "not ready"),
        ({"silent_s": 40.0}, "silent"),
        ({"draining": True}, "draining"),
    ):
        state = engine_status(settings, replace(STATE, **change))["engine"]
        assert (state["supervisor"], state["state"]) == ("alive", word)
    away = engine_status(settings, None)
    assert (away["engine"]["state"], away["aliases"]) == ("away", {})


def test_keys_queues_and_last_sync(settings: EdgeSettings) -> None:
    found = kept_status(settings, busy_timeout_s=1)
    assert found["keys"] == {"access": "auto", "valid": 0, "revoked": 0}
    assert found["queues"] == {"updates": 0, "bytes": 0, "oldest": None}
    assert (found["last_sync"], found["channel"]) == (None, "stable")
    for name, scopes in (("app", [Scope.INFER, Scope.FEEDBACK]), ("old", [Scope.ADMIN])):
        create_key(keys_file(settings), name, scopes, None)
    revoke_key(keys_file(settings), "old")
    add(Outbox(settings.data_dir / "outbox", "auto"), b"payload")
    note_heard(settings.data_dir)
    os.utime(settings.data_dir / HEARD, (1000, 1000))
    found = kept_status(settings, busy_timeout_s=1)
    assert found["keys"] == {"access": "auto", "valid": 1, "revoked": 1, "infer": 1, "feedback": 1}
    assert found["queues"] == {"updates": 1, "bytes": 7, "oldest": "2026-11-22T00:00:00Z"}
    assert found["last_sync"] == "1970-01-01T00:16:40+00:00"


def test_damaged_files_are_unknown_and_hide_nothing(settings: EdgeSettings) -> None:
    keys_file(settings).write_text("{")
    Outbox(settings.data_dir / "outbox", "auto")
    (settings.data_dir / "outbox" / "outbox.db").write_bytes(b"no database")
    found = kept_status(settings, busy_timeout_s=1)
    assert (found["keys"], found["queues"]) == (None, None)


def shown(**status: object) -> str:
    return "\n".join(lines({"problems": [], **status}, NOW))


def test_lines_for_people() -> None:
    text = click.unstyle(
        shown(
            ready=True,
            aliases={"lorikeet": V1},
            last_sync="2026-11-27T11:59:48+00:00",
            keys={"access": "auto", "valid": 2},
            round=None,
            outbox={},
            loaded=[V1],
            versions={V1: {"requests": 3, "errors": 1, "seconds": 0.25}, "base@0": {"requests": 1}},
        )
    )
    assert f"answers of {V1} requests 3, errors 1, seconds 0.25" in text
    assert "answers of base@0" in text
    assert f"lorikeet -> {V1}" in text
    assert "12 s ago (2026-11-27T11:59:48+00:00)" in text
    assert "access auto, valid 2" in text
    assert "none runs" in text
    assert "ready                   yes" in text
    assert "problems                none" in text


def test_what_is_wrong_is_red() -> None:
    assert click.style("no", "red") in shown(ready=False)
    assert click.style("yes", "green") in shown(ready=True)
    problem = {"room": "disk", "since": "now", "text": "Full.", "next_step": "Free some."}
    assert click.style("disk", "red") in shown(problems=[problem])
    assert click.style("none", "green") in shown()


@pytest.mark.parametrize(("variable", "coloured"), [("", True), ("1", False)])
def test_colour_is_for_terminals_that_want_it(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    coloured: bool,
) -> None:
    monkeypatch.setenv("NO_COLOR", variable)
    print_status({"ready": True, "problems": []})
    assert "\x1b[" not in capsys.readouterr().out, "this is no terminal"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_status({"ready": True, "problems": []})
    assert ("\x1b[" in capsys.readouterr().out) == coloured
