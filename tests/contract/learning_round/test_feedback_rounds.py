"""Rounds on preferences, thumbs and scored groups, with the real TRL on a tiny random Llama."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_node import rounds as node_rounds
from edge_node.experience import (
    Answer,
    Choice,
    ExperienceStore,
    Feedback,
    Interaction,
    Preference,
    Scores,
)
from edge_node.learning.batches import pair_batches, thumb_batches
from edge_node.learning.orders import Orders
from edge_node.learning.plans import RoundPlan
from edge_node.learning.records import RoundStore
from edge_node.learning.round import release_directory, train_on_feedback
from edge_node.learning.training import RoundObsolete, load_start
from edge_node.learning.worker import Worker
from edge_node.learning.workplace import find_workplace
from edge_node.settings import EdgeSettings
from protos.lora import encode
from protos.manifest import UpdateManifest, sha256_hex
from tests.contract.learning_round.outboxes import outbox_of
from tests.fakes.anchors import make_tiny_anchors
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, as_environment, make_node
from tests.fakes.tiny_model import POSITIONS, answer_ids, prompt_ids, tiny_adapter, tiny_model

ROOT = Path(__file__).resolve().parents[3]
COUNT = 8


def questions() -> list[tuple[str, str, str]]:
    """A question, an answer that users like, and one that they do not."""
    return [(f"w{n} w{n + 1}", f"w{100 + n} w7", f"w{150 + n} w9") for n in range(COUNT)]


def logprob(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> list[float]:
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        found = model(ids).logits[0, :-1].log_softmax(-1)
    own = found[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
    return [float(value) for value in own[len(prompt) - 1 :]]


def meet(settings: EdgeSettings, label: str) -> ExperienceStore:
    """For each question one request with both answers, and one request for each of them."""
    store = ExperienceStore(settings.data_dir / "experience.db")
    model = load_start(tiny_model(), release_directory(settings.data_dir, _active(settings)))
    for number, (question, *answers) in enumerate(questions()):
        prompt = prompt_ids(question)
        choices = tuple(
            Choice(answer_ids(one), tuple(logprob(model, prompt, answer_ids(one))))
            for one in answers
        )
        several = choices if number else (*choices, choices[1])  # groups differ in size
        for name, kept in (("n", several), ("good", choices[:1]), ("bad", choices[1:])):
            store.add_interactions(
                [
                    Interaction(
                        f"{name}-{number}", "2026-11-22T00:00:00Z",
                        f"{settings.serving.alias}@{label}", [], "", "stop",
                        "/v1/chat/completions", prompt, kept[0].answer_ids,
                        choices=kept if len(kept) > 1 else (),
                    )
                ]
            )  # fmt: skip
    return store


def _active(settings: EdgeSettings) -> str:
    return next(iter((settings.data_dir / "releases/versions").iterdir())).name


def prefer(store: ExperienceStore) -> None:
    for number in range(COUNT):
        better = Preference(Answer(f"n-{number}", 0), Answer(f"bad-{number}"))
        assert not store.add_preference(better, max_tokens=POSITIONS).unusable


def judge(store: ExperienceStore) -> None:
    for number in range(COUNT):
        for name, score in (("good", 1.0), ("bad", 0.0)):
            said = Feedback(f"{name}-{number}", score)
            assert not store.add_feedback(said, max_tokens=POSITIONS).unusable


def score(store: ExperienceStore) -> None:
    for number in range(COUNT):
        said = Scores(f"n-{number}", (0.9, -2.0) if number else (0.9, -2.0, -2.0))
        assert not store.add_scores(said, max_tokens=POSITIONS).unusable


TELL: dict[str, Callable[[ExperienceStore], None]] = {"dpo": prefer, "kto": judge, "scored": score}


def ready(data_dir: Path, method: str, steps: int, **learning: Any) -> EdgeSettings:
    settings = make_node(
        data_dir,
        feedback={"steps": steps, "batch": 4, "learning_rate": 5e-3},
        grpo={"steps": steps, "prompts": 4, "learning_rate": 5e-3},
        **learning,
    )
    release = activate(settings, tiny_adapter(5, strength=0.3), version=1)
    store = meet(settings, release.label)
    TELL[method](store)
    store.close()
    return settings


def sent(settings: EdgeSettings) -> tuple[UpdateManifest, str]:
    outbox = outbox_of(settings)
    (entry,) = outbox.list()
    payload = outbox.payload_path(entry.round_id).read_bytes()
    return UpdateManifest.from_bytes(outbox.signed(entry.update_id)[0]), sha256_hex(payload)


def exact_kl(model: Any, start: Any, plan: RoundPlan, settings: EdgeSettings) -> float:
    """KL(model || start) on every answer of the last step, nats a token."""
    store = ExperienceStore(settings.data_dir / "experience.db")
    known = {"up_to": plan.cursor, "limit": plan.max_examples}
    if plan.method == "dpo":
        pairs = pair_batches(plan, store.pairs(**known))[-1]
        answers = [
            (one.prompt_ids, ids) for one in pairs for ids in (one.chosen_ids, one.rejected_ids)
        ]
    else:
        thumbs = thumb_batches(plan, store.thumbs(**known))[-1]
        answers = [(one.prompt_ids, one.answer_ids) for one in thumbs]
    total = tokens = 0.0
    for prompt, answer in answers:
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            mine, before = (one(ids).logits[0].log_softmax(-1) for one in (model, start))
        kl = (mine.exp() * (mine - before)).sum(-1)[len(prompt) - 1 : -1]
        total, tokens = total + float(kl.sum()), tokens + len(answer)
    return total / tokens


def margin(model: Any) -> float:
    """How much likelier the liked answers are than the others, mean over the questions, nats."""
    return (
        sum(
            sum(logprob(model, prompt_ids(asked), answer_ids(good)))
            - sum(logprob(model, prompt_ids(asked), answer_ids(bad)))
            for asked, good, bad in questions()
        )
        / COUNT
    )


@pytest.mark.parametrize("method", ["dpo", "kto", "scored"])
def test_liked_answers_become_likelier_and_a_round_goes_on_to_the_same_bytes(
    tmp_path: Path, method: str
) -> None:
    settings = ready(tmp_path / "node", method, steps=12, checkpoint_steps=5)
    assert Worker(settings, NODE_ID).step()
    manifest, digest = sent(settings)
    expected = {"dpo": COUNT, "kto": 2 * COUNT, "scored": COUNT}[method]
    assert (manifest.metrics[method], manifest.experiences) == (1.0, expected)
    plan = RoundStore(settings.data_dir / "learning").last()
    assert plan is not None
    assert plan.method == method
    release = release_directory(settings.data_dir, plan.release_id)
    place, steps = find_workplace(plan, settings, release, tmp_path / "w"), iter(range(7))
    with pytest.raises(RoundObsolete):
        train_on_feedback(
            plan, settings, replace(place, obsolete=lambda: next(steps, None) is None)
        )
    assert [path.name for path in (tmp_path / "w").glob("check*")] == ["checkpoint-5"]
    again = train_on_feedback(plan, settings, place)
    assert sha256_hex(encode(again.tensors)) == digest
    before, after = margin(load_start(tiny_model(), release)), margin(again.model.eval())
    assert after > before + 1
    start = load_start(tiny_model(), release)
    if method != "scored":
        moved = exact_kl(again.model.eval(), start, plan, settings)
        assert manifest.metrics["kl_release"] == pytest.approx(moved, rel=1e-3)
        assert moved > 0.01
    if method == "scored":  # the release's answers do not tell how far the model is from it
        assert "kl_release" not in manifest.metrics
    else:
        assert manifest.metrics["margin_first"] == pytest.approx(0, abs=1e-3), (
            "the first step's reference is the release"
        )
        assert manifest.metrics["margin_last"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_killed_round_resumes_to_the_same_bytes(tmp_path: Path, method: str) -> None:
    """With the base's own samples as anchors."""
    anchors = make_tiny_anchors(tmp_path / "anchors")
    expected, killed = (
        ready(tmp_path / name, method, steps=20, checkpoint_steps=2, anchors=anchors)
        for name in ("whole", "killed")
    )
    assert Worker(expected, NODE_ID).step()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("EDGE_")}
    child = subprocess.Popen(
        [sys.executable, "-m", "edge_node.learning.worker", "--parent", str(os.getpid())],
        env=clean | as_environment(killed) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    rounds = killed.data_dir / "learning/rounds"
    deadline = time.monotonic() + 120
    while not list(rounds.glob("*/checkpoint-*/sealed.json")):
        assert child.poll() is None, "the worker ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    assert not outbox_of(killed).list()
    assert Worker(killed, NODE_ID).step()
    (manifest, digest), (resumed, same) = sent(expected), sent(killed)
    assert digest == same
    kept = [
        {name: value for name, value in one.metrics.items() if name != "seconds"}
        for one in (manifest, resumed)
    ]
    assert kept[0] == kept[1]
    assert {"kl_first", "kl_last", method} < set(kept[0])
    progress = node_rounds.show_round(killed, "1")["progress"]
    assert progress["kl_base"] == pytest.approx(kept[1]["kl_last"])


def test_thumbs_of_a_cancelled_round_are_learnt_by_no_other_method(tmp_path: Path) -> None:
    settings = ready(tmp_path / "node", "kto", steps=2)
    worker, rounds = Worker(settings, NODE_ID), RoundStore(settings.data_dir / "learning")
    plan = worker._next_round()
    assert plan is not None
    assert plan.method == "kto"
    Orders(rounds).cancel(plan, lambda _: False)
    assert worker._next_round() is None
    store = ExperienceStore(settings.data_dir / "experience.db")
    for number in range(2):
        said = Feedback(f"bad-{number}", 0.0, correction="w3", correction_ids=answer_ids("w3"))
        store.add_feedback(said, max_tokens=POSITIONS)
    after = worker._next_round()
    assert after is not None
    assert after.method == "sft", "what is new is learnt"


def test_groups_of_another_release_are_dropped_and_counted(tmp_path: Path) -> None:
    settings = ready(tmp_path / "node", "scored", steps=2)
    store = ExperienceStore(settings.data_dir / "experience.db")
    old = store.interaction("n-1")
    assert old is not None
    for number in range(3):
        stale = Interaction(**{**vars(old), "id": f"old-{number}", "model": "lorikeet@v0-00000000"})
        store.add_interactions([stale])
        store.add_scores(Scores(stale.id, (0.0, 1.0)), max_tokens=POSITIONS)
    assert Worker(settings, NODE_ID).step()
    manifest, _ = sent(settings)
    assert (manifest.metrics["groups_stale"], manifest.experiences) == (3, COUNT)
    assert not Worker(settings, NODE_ID).step(), "nothing is new"
