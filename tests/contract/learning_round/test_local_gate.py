"""The local gate of every method: worker, control socket, middleware, outbox; a tiny sampler."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edge_node import rounds as node_rounds
from edge_node.doctor import node_status
from edge_node.errors import SettingsError
from edge_node.experience import ExperienceStore, Feedback, Interaction
from edge_node.learning import round as learning_round
from edge_node.learning.records import RoundStore
from edge_node.learning.steering import NodeSteering
from edge_node.learning.training import TrainedRound
from edge_node.learning.worker import Worker
from edge_node.problems import Problem, Problems
from edge_node.releases.evaluation import Evaluator
from edge_node.settings import EdgeSettings
from protos.lora import LoraTensors
from protos.manifest import UpdateManifest
from tests.contract.learning_round.outboxes import outbox_of
from tests.contract.learning_round.test_feedback_rounds import TELL, meet
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, as_environment, make_node
from tests.fakes.node_data import meet as meet_wrong
from tests.fakes.policy_vllm import policies_on_disk, sampling_vllm
from tests.fakes.tiny_model import POSITIONS, answer_ids, prompt_ids, tiny_adapter
from tests.fakes.tiny_sampler import TinySampler

ROOT = Path(__file__).resolve().parents[3]
MOVED = tiny_adapter(7, rank=4, strength=0.6)
"""What a round makes here, without training: few answers stay the same."""
METRICS = {"examples": 8.0, "steps": 1.0, "seconds": 0.1}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the base says to 40 words, and what it says with MOVED."""
    sampler, found = TinySampler(), {}
    for name, adapter in (("before", LoraTensors()), ("after", MOVED)):
        sampler.use(adapter)
        said = {}
        for number in range(40):
            ids = sampler.prompt_ids([{"role": "user", "content": f"w{number}"}])
            (answer,) = sampler.answers(ids, samples=1, seed=0, max_tokens=1, greedy=True)
            said[f"w{number}"] = answer.text.strip()
        found[name] = tmp_path_factory.mktemp(name) / "answers.json"
        found[name].write_text(json.dumps(said))
    return found


def corrected(store: ExperienceStore, label: str) -> None:
    for number in range(8):
        store.add_interactions(
            [
                Interaction(
                    f"c-{number}", "2026-11-22T00:00:00Z", f"lorikeet@{label}", [], "", "stop",
                    "/v1/chat/completions", prompt_ids(f"w{number}"), answer_ids("w3"),
                )
            ]
        )  # fmt: skip
        said = Feedback(f"c-{number}", 0.0, correction="w8", correction_ids=answer_ids("w8"))
        store.add_feedback(said, max_tokens=POSITIONS)


def node(data_dir: Path, right: Path, method: str = "sft", **options: Any) -> EdgeSettings:
    """It has an anchor, the environment `desk`, and something to learn from by that method."""
    learning: dict[str, Any] = {
        "gate": {"tasks": 32, "attempts": 2},
        "grpo": {"max_answer_tokens": 1},
        "batch_anchor": 0,
    }
    settings = make_node(data_dir, method="auto" if method == "grpo" else method, **learning)
    desk = {
        "name": "desk",
        "factory": "tests.fakes.known_answers:KnownAnswers",
        "options": {"path": str(right)} | options,
        "rollouts": method == "grpo",
    }
    environments = [*settings.model_dump()["environments"], desk]
    settings = EdgeSettings.model_validate(settings.model_dump() | {"environments": environments})
    label = activate(settings, LoraTensors(), version=0).label
    if method == "sft":
        store = ExperienceStore(settings.data_dir / "experience.db")
        corrected(store, label)
        store.close()
    elif method != "grpo":
        store = meet(settings, label)
        TELL[method](store)
        store.close()
    return settings


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of any method makes MOVED, whatever it trains on."""
    trained = TrainedRound(MOVED, METRICS, None)
    monkeypatch.setattr(learning_round, "TRAIN", {})
    monkeypatch.setattr(learning_round, "train_on_feedback", lambda *_: trained)


def problem(settings: EdgeSettings) -> Problem:
    (found,) = Problems(settings.data_dir).current()
    assert found.room == "local-gate"
    return found


def sent(settings: EdgeSettings) -> dict[str, float]:
    outbox = outbox_of(settings)
    (entry,) = outbox.list()
    return UpdateManifest.from_bytes(outbox.signed(entry.update_id)[0]).metrics


@pytest.mark.parametrize("method", ["sft", "dpo", "scored", "kto", "grpo"])
def test_a_round_that_makes_an_environment_worse_is_not_sent_whatever_its_method(
    tmp_path: Path, answers: dict[str, Path], moves: None, method: str
) -> None:
    settings = node(tmp_path, answers["before"], method)
    worker = Worker(settings, NODE_ID)
    with sampling_vllm(settings) as (vllm, _):
        assert worker.step()
        assert len(vllm.loaded) == 1, "the policy is gone"
        status = asyncio.run(node_status(settings))
        assert worker.step() is (method == "grpo"), "nothing is new, but a verifier may be asked"
    assert not outbox_of(settings).list()
    assert not policies_on_disk(settings)
    why = "the local gate stops it: environment desk: of 32 held-out tasks 32 were passed and now"
    assert f"({method}) given up: {why}" in status["last_round"]
    assert "(0 better, " in status["last_round"]
    assert why in problem(settings).text
    assert {request["capture"] for request in vllm.requests} == {"off"}


def test_a_round_that_passes_says_what_was_counted(
    tmp_path: Path, answers: dict[str, Path], moves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, kept = node(tmp_path, answers["after"]), []
    Problems(settings.data_dir).report("local-gate", "of the round before", "none")
    # Nothing may be served of a round that is still cancelled, or dropped, after a crash.
    monkeypatch.setattr(
        learning_round, "keep_own", lambda *_: kept.append(len(outbox_of(settings).list()))
    )
    with sampling_vllm(settings) as (vllm, _):
        assert Worker(settings, NODE_ID).step()
    assert kept == [1], "once, and its update is in the outbox"
    metrics = sent(settings)
    assert metrics["held_out_tasks"] == metrics["anchor_tasks"] == 32
    assert (metrics["held_out_policy"], metrics["held_out_worse"]) == (1, 0)
    assert metrics["held_out_better"] == 32 - 32 * metrics["held_out_start"] > 9
    assert metrics["held_out_every_tasks"] == 32
    assert metrics["gate_unjudged"] == 0
    assert not Problems(settings.data_dir).current()
    shown = node_rounds.show_round(settings, "1")
    assert shown["gate"] == {name: metrics[name] for name in metrics.keys() - METRICS.keys()}
    greedy = [request for request in vllm.requests if request["temperature"] == 0]
    assert len(greedy) == 2 * 2 * 32, "both sides, two environments"
    sampled = [request for request in vllm.requests if request["temperature"] > 0]
    seeds = [
        {(one["messages"][0]["content"], one["seed"]) for one in sampled if one["model"][0] == side}
        for side in "lp"  # lorikeet@..., policy/...
    ]
    assert len(seeds[0] & seeds[1]) >= 60, "the first attempts of both sides have the same seeds"


def test_without_environments_nothing_is_asked(
    tmp_path: Path, answers: dict[str, Path], moves: None
) -> None:
    """There is no vLLM at all."""
    settings = node(tmp_path, answers["before"])
    none = EdgeSettings.model_validate(settings.model_dump() | {"environments": []})
    Problems(settings.data_dir).report("local-gate", "of the settings of before", "none")
    assert Worker(none, NODE_ID).step()
    assert sent(none).keys() == METRICS.keys()
    assert not Problems(settings.data_dir).current()


def test_what_cannot_be_judged_stops_no_round_and_status_says_so(
    tmp_path: Path, answers: dict[str, Path], moves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_node.learning.gate.RETRY_S", 0.0)
    raises, refused = tmp_path / "raises", tmp_path / "refused"
    settings = node(raises, answers["before"], raises=True)
    with sampling_vllm(settings):
        assert Worker(settings, NODE_ID).step()
    metrics = sent(settings)
    assert (metrics["gate_unjudged"], metrics["anchor_tasks"]) == (1, 32)
    assert "held_out_tasks" not in metrics
    assert "was not judged on desk. Environment 'desk'" in problem(settings).text
    settings = node(refused, answers["before"])
    with sampling_vllm(settings) as (vllm, _):
        vllm.refuses = True
        assert Worker(settings, NODE_ID).step()
    assert sent(settings)["gate_unjudged"] == 2
    assert "was not judged on words, desk. vLLM answered 400" in problem(settings).text


@pytest.mark.parametrize("error", [SettingsError("It holds more than text."), KeyError("w8")])
def test_a_template_that_refuses_a_task_stops_no_round(
    tmp_path: Path,
    answers: dict[str, Path],
    moves: None,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    compare = Evaluator.compare

    async def refuses(self: Evaluator, name: str, *others: Any) -> Any:
        if name == "desk":
            raise error
        return await compare(self, name, *others)

    monkeypatch.setattr(Evaluator, "compare", refuses)
    settings = node(tmp_path, answers["before"])
    with sampling_vllm(settings):
        assert Worker(settings, NODE_ID).step()
    assert (sent(settings)["gate_unjudged"], sent(settings)["anchor_tasks"]) == (1, 32)
    text = problem(settings).text
    assert "was not judged on desk. " in text
    assert "w8" not in text


def test_a_policy_that_vllm_cannot_serve_is_sent_unjudged(
    tmp_path: Path, answers: dict[str, Path], moves: None
) -> None:
    settings = node(tmp_path, answers["before"])
    learning = settings.learning.model_copy(update={"rank": 16})
    serving = settings.serving.model_copy(update={"max_lora_rank": 8})
    settings = settings.model_copy(update={"serving": serving, "learning": learning})
    assert Worker(settings, NODE_ID).step()
    assert sent(settings)["gate_unjudged"] == 2
    text = problem(settings).text
    assert "have rank 16 together, and this node serves adapters up to rank 8" in text


def test_a_cancelled_round_asks_no_further_environment(
    tmp_path: Path, answers: dict[str, Path], moves: None
) -> None:
    settings = node(tmp_path, answers["after"])
    with sampling_vllm(settings) as (vllm, _):
        heard = vllm.hears

        def cancels(body: dict[str, Any]) -> None:
            heard(body)
            if len(vllm.requests) == 1:
                node_rounds.cancel_round(settings, None)

        vllm.hears = cancels  # type: ignore[method-assign, assignment]
        assert Worker(settings, NODE_ID).step()
        assert len(vllm.loaded) == 1
    assert not outbox_of(settings).list()
    assert {one["messages"][0]["content"] for one in vllm.requests} <= {f"w{n}" for n in range(100)}
    assert len([one for one in vllm.requests if one["temperature"] == 0]) == 64, "the anchor's"


def test_a_round_that_would_supersede_ends_when_the_node_moves_on(
    tmp_path: Path, answers: dict[str, Path], moves: None
) -> None:
    settings = node(tmp_path, answers["after"])
    with sampling_vllm(settings) as (vllm, _):
        worker = Worker(settings, NODE_ID)
        assert worker.step()
        active = json.loads((settings.data_dir / "releases/active.json").read_text())
        meet_wrong(settings, active["label"], 3)
        heard = vllm.hears

        def moves_on(body: dict[str, Any]) -> None:
            heard(body)
            activate(settings, tiny_adapter(1), version=1)

        vllm.hears = moves_on  # type: ignore[method-assign, assignment]
        assert worker.step()
    assert len(outbox_of(settings).list()) == 1
    (end, _) = RoundStore(settings.data_dir / "learning").ends()
    assert (end.state, end.result) == ("given up", "obsolete before the local gate asked desk")


@pytest.mark.parametrize("asked", [1, 129])
def test_what_is_deleted_while_the_gate_asks_ends_the_round_for_that_reason_alone(
    tmp_path: Path, answers: dict[str, Path], moves: None, asked: int
) -> None:
    """So the next round learns from what is left, whatever the gate would have said."""
    settings = node(tmp_path, answers["before"])
    with sampling_vllm(settings) as (vllm, _):
        heard = vllm.hears

        def deletes(body: dict[str, Any]) -> None:
            heard(body)
            if len(vllm.requests) == asked:
                store = ExperienceStore(settings.data_dir / "experience.db")
                store.delete("c-0")
                store.close()

        vllm.hears = deletes  # type: ignore[method-assign, assignment]
        assert Worker(settings, NODE_ID).step()
    assert not outbox_of(settings).list()
    assert not Problems(settings.data_dir).current()
    rounds = RoundStore(settings.data_dir / "learning")
    (end,) = rounds.ends()
    when = "before the local gate asked desk" if asked == 1 else "after the local gate"
    assert (end.state, end.result) == ("given up", f"obsolete {when}")
    assert rounds.cursors()["sft"] == 0, "all that is left is news"


def test_the_gate_begins_in_a_window_only(
    tmp_path: Path, answers: dict[str, Path], moves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = node(tmp_path, answers["after"])
    worker = Worker(settings, NODE_ID)
    with sampling_vllm(settings) as (vllm, _):
        monkeypatch.setattr(NodeSteering, "must_pause", lambda self: True)
        assert worker.step()
        assert not vllm.requests
        assert RoundStore(settings.data_dir / "learning").unfinished() is not None
        monkeypatch.undo()
        monkeypatch.setattr(learning_round, "TRAIN", {})
        trained = TrainedRound(MOVED, METRICS, None)
        monkeypatch.setattr(learning_round, "train_on_feedback", lambda *_: trained)
        assert worker.step()
    assert sent(settings)["held_out_tasks"] == 32


@pytest.mark.slow
def test_a_learner_that_is_killed_while_the_gate_asks_sends_the_same_update(
    tmp_path: Path, answers: dict[str, Path]
) -> None:
    """A real round."""
    whole, killed = (node(tmp_path / name, answers["after"]) for name in ("whole", "killed"))
    with sampling_vllm(whole):
        assert Worker(whole, NODE_ID).step()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("EDGE_")}
    with sampling_vllm(killed) as (vllm, _):
        child = subprocess.Popen(
            [sys.executable, "-m", "edge_node.learning.worker", "--parent", str(os.getpid())],
            env=clean | as_environment(killed) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
        )
        deadline = time.monotonic() + 120
        while len(vllm.requests) < 20:
            assert child.poll() is None, "the worker ended before the gate asked"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait(30)
        assert not outbox_of(killed).list()
        assert Worker(killed, NODE_ID).step()
        assert len(vllm.loaded) == 1, "the killed learner's policy is swept"
    payloads = []
    for settings in (whole, killed):
        (entry,) = outbox_of(settings).list()
        payloads.append(outbox_of(settings).payload_path(entry.round_id).read_bytes())
    assert payloads[0] == payloads[1]
