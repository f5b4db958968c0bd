"""The command line of a broken node: one line, the error's exit code, never a traceback."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from edge_node.cli import main
from edge_node.errors import IN_TROUBLE, UnknownInteraction
from edge_node.experience import ExperienceStore
from edge_node.outbox import Outbox
from edge_node.problems import Problems
from edge_node.settings import EdgeSettings
from tests.fakes.identity import make_identity
from tests.unit.edge_node.experience.test_experience_store import make_interaction
from tests.unit.edge_node.outbox.test_outbox_store import add


@pytest.fixture(autouse=True)
def data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for key in [key for key in os.environ if key.startswith("EDGE_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("EDGE_DATA_DIR", str(tmp_path / "node"))
    return tmp_path / "node"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) <= 1, captured.err
    return int(ended.value.code or 0), lines[0] if lines else captured.out


@pytest.mark.parametrize(
    "arguments", [("status",), ("outbox",), ("outbox", "list"), ("outbox", "approve", "ab")]
)
def test_a_mistyped_data_directory_is_not_made(
    capsys: pytest.CaptureFixture[str], data_dir: Path, arguments: tuple[str, ...]
) -> None:
    code, line = run(capsys, *arguments)
    assert (code, "not enrolled" in line) == (3, True)
    assert not data_dir.exists()


def test_an_interaction_is_deleted_once_and_a_mistyped_one_makes_nothing(
    capsys: pytest.CaptureFixture[str], data_dir: Path
) -> None:
    code, line = run(capsys, "experience", "delete", "chatcmpl-1")
    assert (code, "No interaction 'chatcmpl-1'" in line) == (UnknownInteraction.exit_code, True)
    assert not data_dir.exists()
    store = ExperienceStore(data_dir / "experience.db")
    store.add_interactions([make_interaction(1)])
    assert run(capsys, "experience", "delete", "chatcmpl-1") == (
        0,
        "Deleted chatcmpl-1; 1 were deleted so far.\n",
    )
    assert store.interaction("chatcmpl-1") is None


def test_only_a_held_update_is_approved(capsys: pytest.CaptureFixture[str], data_dir: Path) -> None:
    make_identity(data_dir)
    update_id = add(Outbox(data_dir / "outbox", "auto"))
    code, line = run(capsys, "outbox", "approve", update_id[:8])
    assert code == 1
    assert "is waiting; only an update that is held" in line


def test_a_file_that_is_no_database_is_named(
    capsys: pytest.CaptureFixture[str], data_dir: Path
) -> None:
    make_identity(data_dir)
    (data_dir / "outbox" / "payloads").mkdir(parents=True)
    (data_dir / "outbox" / "outbox.db").write_text("garbage" * 1000)
    code, line = run(capsys, "outbox", "list")
    assert (code, "not a database" in line) == (5, True)


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied", "x"), sqlite3.OperationalError("disk I/O error")],
)
def test_unexpected_trouble_of_the_disk_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(settings: EdgeSettings) -> None:
        raise error

    monkeypatch.setattr("edge_node.doctor.node_status", fail)
    code, line = run(capsys, "status")
    assert (code, "Check EDGE_DATA_DIR" in line) == (5, True)


UPLOADS = {
    "room": "uploads",
    "text": "It is away.",
    "next_step": "Wait.",
    "since": "2026-11-26T00:00:00+00:00",
}


@pytest.mark.parametrize(
    ("ready", "problems", "code"),
    [(True, [], 0), (False, [], 1), (False, [UPLOADS], 1), (True, [UPLOADS], IN_TROUBLE)],
)
def test_status_shows_each_problem_and_its_exit_code_says_so(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ready: bool,
    problems: list[dict[str, str]],
    code: int,
) -> None:
    async def status(settings: EdgeSettings) -> dict[str, Any]:
        versions = {"lorikeet@v1": {"requests": 7, "errors": 0, "seconds": 1.25}}
        shown = {"node_id": "n-1", "ready": ready, "not_ready": None, "problems": problems}
        return shown | {"versions": versions}

    monkeypatch.setattr("edge_node.doctor.node_status", status)
    ended, text = run(capsys, "status")
    assert ended == code
    assert "answers of lorikeet@v1   requests 7, errors 0, seconds 1.25" in text
    assert ("uploads, since 2026-11-26T00:00:00+00:00: It is away." in text) == bool(problems)
    assert ("Next: Wait." in text) == bool(problems)
    ended, text = run(capsys, "status", "--json")
    assert (ended, json.loads(text)["problems"]) == (code, problems)


def test_a_probe_looks_at_the_supervisor_alone(
    capsys: pytest.CaptureFixture[str], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir.mkdir()
    (data_dir / "supervisor.alive").touch()
    Problems(data_dir).report("serving", "It does not start.", "Free the port.")
    assert run(capsys, "status", "--live")[0] == 0


@pytest.mark.parametrize("arguments", [("--json", "list"), ("list", "--json"), ("--json",)])
def test_json_may_stand_before_or_after_the_action(
    capsys: pytest.CaptureFixture[str], data_dir: Path, arguments: tuple[str, ...]
) -> None:
    make_identity(data_dir)
    update_id = add(Outbox(data_dir / "outbox", "auto"))
    code, text = run(capsys, "outbox", *arguments)
    assert (code, json.loads(text)[0]["update_id"]) == (0, update_id)
