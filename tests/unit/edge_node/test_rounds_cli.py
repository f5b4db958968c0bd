"""`edge-node rounds` on the files of a node that does not run."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from edge_node.learning.orders import Orders
from edge_node.learning.plans import RoundPlan
from edge_node.learning.records import RoundStore
from edge_node.learning.reports import Progress, report_folder
from edge_node.outbox import Outbox
from protos.lora import LoraTensors
from protos.manifest import Payload, Start, UpdateManifest, sha256_hex
from tests.fakes.identity import NODE_ID, make_identity
from tests.fakes.node_data import activate, as_environment, make_node, meet
from tests.unit.edge_node.learning.test_records import make_plan
from tests.unit.edge_node.test_edge_cli import run

EVEN = {"name": "even", "factory": "tests.fakes.even_words:EvenWords", "rollouts": True}


@pytest.fixture(autouse=True)
def data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for key in [key for key in os.environ if key.startswith("EDGE_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("EDGE_DATA_DIR", str(tmp_path / "node"))
    return tmp_path / "node"


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> Path:
    """An enrolled node with a release and without experience."""
    settings = make_node(data_dir)
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    activate(settings, LoraTensors(), version=0)
    return data_dir


def report(data_dir: Path, plan: RoundPlan, step: int) -> None:
    entries = [{"step": n, "loss": 1 / n, "reward": 0.1 * n} for n in range(1, step + 1)]
    progress = Progress(step, plan.steps, 1.5, 9.5, 640, "", entries)
    folder = report_folder(data_dir, plan.round_id)
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(json.dumps(asdict(progress)))


def send(data_dir: Path, plan: RoundPlan, metrics: dict[str, float]) -> str:
    manifest = UpdateManifest(
        node_id=NODE_ID, sequence=1, base="b" * 64,
        start=Start(release=plan.release_id, payload="c" * 64, prefix_rank=0, dtype="float32"),
        rank=1, payload=Payload(digest_sha256=sha256_hex(b"x"), size_bytes=1),
        round_id=plan.round_id, experiences=6, metrics=metrics, created_at=plan.created_at,
        software="test",
    ).to_bytes()  # fmt: skip
    return Outbox(data_dir / "outbox", "auto").add(plan.round_id, manifest, b"signature", b"x")


@pytest.mark.parametrize("arguments", [(), ("list",), ("show", "1"), ("run",), ("cancel",)])
def test_a_mistyped_data_directory_is_not_made(
    capsys: pytest.CaptureFixture[str], data_dir: Path, arguments: tuple[str, ...]
) -> None:
    code, line = run(capsys, "rounds", *arguments)
    assert (code, "not enrolled" in line) == (3, True)
    assert not data_dir.exists()


def test_list_shows_how_each_round_stands_and_quotes_nobody(
    capsys: pytest.CaptureFixture[str], data_dir: Path
) -> None:
    make_identity(data_dir)
    assert run(capsys, "rounds") == (0, "This node has begun no round yet.\n")
    store = RoundStore(data_dir / "learning")
    plans = [make_plan(number) for number in (1, 2, 3)]
    store.begin(plans[0])
    store.finish(plans[0].round_id, "4" * 64)
    store.begin(plans[1])
    store.abandon(plans[1].round_id, "ValueError('a customer wrote this')")
    Orders(store).want("grpo")
    store.begin(plans[2])
    report(data_dir, plans[2], 7)
    code, text = run(capsys, "rounds", "list")
    assert code == 0
    third, second, first, wish = text.splitlines()
    assert plans[2].round_id in third
    assert "training" in third
    assert " 7/50" in third
    assert "ValueError" in second
    assert "customer" not in text
    assert "?/50" in first
    assert "4" * 60 in first
    assert wish.startswith("A round by grpo was asked for at 20")
    _, listed = run(capsys, "rounds", "--json")
    newest = json.loads(listed)[0]
    assert newest == {
        "number": 3, "round_id": plans[2].round_id, "method": "sft", "release": plans[2].label,
        "state": "training", "begun": plans[2].created_at, "steps_done": 7, "steps": 50,
        "result": "",
    }  # fmt: skip


def test_show_has_plan_progress_metrics_and_the_gates_counts(
    capsys: pytest.CaptureFixture[str], node: Path
) -> None:
    store = RoundStore(node / "learning")
    plan = make_plan(1)
    store.begin(plan)
    report(node, plan, 2)
    code, text = run(capsys, "rounds", "show", "1", "--json")
    assert code == 0
    shown = json.loads(text)
    assert shown["plan"]["learning_rate"] == plan.learning_rate
    assert shown["environments"] == ["words"]
    assert shown["progress"] == {
        "step": 2, "steps": 50, "seconds": 1.5, "eta_s": 9.5, "tokens": 640, "waits": "",
        "stage": "", "loss": 0.5, "reward": 0.2,
    }  # fmt: skip
    assert (shown["ended"], shown["metrics"], shown["gate"], shown["tensorboard"]) == (
        None, {}, {}, None,
    )  # fmt: skip
    assert Path(shown["report"]).is_file()
    update = send(node, plan, {"loss_last": 0.25, "held_out_tasks": 32.0, "held_out_better": 9.0})
    store.finish(plan.round_id, update)
    (report_folder(node, plan.round_id) / "tensorboard").mkdir()
    _, text = run(capsys, "rounds", "show", plan.round_id[:7], "--json")
    shown = json.loads(text)
    assert (shown["state"], shown["result"]) == ("finished", update)
    assert shown["metrics"] == {"loss_last": 0.25}
    assert shown["gate"] == {"held_out_tasks": 32.0, "held_out_better": 9.0}
    assert Path(shown["tensorboard"]).is_dir()
    _, text = run(capsys, "rounds", "show", "1")
    assert "  held_out_better      9\n" in text


@pytest.mark.parametrize(("name", "words"), [("7", "0 rounds match '7'"), ("r", "2 rounds match")])
def test_show_needs_one_round(
    capsys: pytest.CaptureFixture[str], data_dir: Path, name: str, words: str
) -> None:
    make_identity(data_dir)
    store = RoundStore(data_dir / "learning")
    for number in (1, 2):
        store.begin(make_plan(number))
        store.give_up(make_plan(number).round_id, "")
    code, line = run(capsys, "rounds", "show", name)
    assert (code, words in line) == (1, True), line


def test_a_plot_needs_matplotlib_and_a_report(
    capsys: pytest.CaptureFixture[str],
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_identity(data_dir)
    RoundStore(data_dir / "learning").begin(make_plan(1))
    picture = tmp_path / "round.png"
    code, line = run(capsys, "rounds", "show", "1", "--plot", str(picture))
    assert (code, "There is no report of round r000001" in line) == (5, True), line
    report(data_dir, make_plan(1), 5)
    code, text = run(capsys, "rounds", "show", "1", "--plot", str(picture))
    assert (code, str(picture) in text) == (0, True)
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, line = run(capsys, "rounds", "show", "1", "--plot", str(tmp_path / "no" / "x.png"))
    assert (code, "Cannot write the plot" in line) == (5, True), line
    monkeypatch.setattr("edge_node.learning.plot.find_spec", lambda name: None)
    code, line = run(capsys, "rounds", "show", "1", "--plot", str(picture))
    assert (code, "pip install matplotlib" in line) == (2, True), line


def asked(monkeypatch: pytest.MonkeyPatch, **learning: Any) -> None:
    for name, value in learning.items():
        monkeypatch.setenv(f"EDGE_LEARNING__{name.upper()}", value)


def test_run_asks_for_a_round_below_every_threshold(
    capsys: pytest.CaptureFixture[str], node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, line = run(capsys, "rounds", "run")
    assert (code, "nothing to learn from by sft: it holds 0 corrected or verified" in line) == (
        1,
        True,
    )
    settings = make_node(node)
    label = json.loads((node / "releases/active.json").read_text())["label"]
    meet(settings, label, 1)
    code, line = run(capsys, "rounds", "run")
    assert (code, line) == (
        0, f"A round by sft from {label} is asked for. It starts when the node runs.\n",
    )  # fmt: skip
    wish = Orders(RoundStore(node / "learning")).wish()
    assert wish is not None
    assert wish.method == "sft"
    (node / "supervisor.alive").touch()
    monkeypatch.setenv("EDGE_ENVIRONMENTS", json.dumps([EVEN]))
    code, text = run(capsys, "rounds", "run", "--method", "grpo", "--json")
    assert json.loads(text) == {"method": "grpo", "release": label, "starts": "now"}
    code, line = run(capsys, "rounds", "cancel")
    assert (code, line) == (0, "The round that was asked for will not start.\n")
    assert Orders(RoundStore(node / "learning")).wish() is None


def test_run_says_when_a_window_must_open_first(
    capsys: pytest.CaptureFixture[str], node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet(make_node(node), "v0", 1)
    (node / "supervisor.alive").touch()
    asked(monkeypatch, schedule='["22:00-06:00"]')
    monkeypatch.setattr("edge_node.schedule.is_open", lambda windows: not windows)
    _, line = run(capsys, "rounds", "run")
    assert "It starts in the next window of EDGE_LEARNING__SCHEDULE." in line


def test_run_is_refused_where_no_round_can_start(
    capsys: pytest.CaptureFixture[str], node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet(make_node(node), "v0", 1)
    RoundStore(node / "learning").begin(make_plan(1))
    code, line = run(capsys, "rounds", "run")
    assert (code, "runs; expected none" in line) == (1, True)
    (node / "releases/active.json").unlink()
    code, line = run(capsys, "rounds", "run")
    assert (code, "This node has no release yet" in line) == (1, True)
    asked(monkeypatch, enabled="false")
    code, line = run(capsys, "rounds", "run")
    assert (code, "EDGE_LEARNING__ENABLED is false" in line) == (1, True)
    asked(monkeypatch, enabled="true", method="sft")
    code, line = run(capsys, "rounds", "run", "--method", "magic")
    assert (code, "'magic' is not one of 'sft', 'dpo'" in line) == (2, True)


def test_cancel_ends_the_round_that_runs(capsys: pytest.CaptureFixture[str], node: Path) -> None:
    code, line = run(capsys, "rounds", "cancel")
    assert (code, "No round runs" in line) == (1, True)
    store = RoundStore(node / "learning")
    store.begin(make_plan(1))
    round_id = make_plan(1).round_id
    code, line = run(capsys, "rounds", "cancel", "")
    assert (code, "0 rounds match ''" in line) == (1, True), "an unset variable of a script"
    assert run(capsys, "rounds", "cancel") == (0, f"Round {round_id} is cancelled.\n")
    assert store.unfinished() is None
    code, line = run(capsys, "rounds", "cancel", "1")
    assert (code, "has ended meanwhile" in line) == (1, True)
    _, text = run(capsys, "rounds")
    assert "cancelled" in text
    assert "by an operator" in text
    store.begin(make_plan(2))
    send(node, make_plan(2), {})
    code, line = run(capsys, "rounds", "cancel")
    assert (code, "its update is in the outbox" in line) == (1, True)
    assert store.unfinished() is not None
