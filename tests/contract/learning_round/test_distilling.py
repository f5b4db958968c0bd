"""Self-distillation with the real TRL on a tiny random Llama, which cannot use a demonstration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_node.experience import ExperienceStore
from edge_node.learning import distilling
from edge_node.learning.batches import Lesson
from edge_node.learning.records import RoundStore
from edge_node.learning.round import own_lessons, release_directory, train_on_experience
from edge_node.learning.training import RoundObsolete, load_start
from edge_node.learning.worker import Worker
from edge_node.learning.workplace import find_workplace
from edge_node.problems import Problems
from edge_node.settings import EdgeSettings
from protos.lora import encode
from protos.manifest import UpdateManifest
from tests.contract.learning_round.outboxes import outbox_of
from tests.fakes.anchors import make_tiny_anchors
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, make_node, meet
from tests.fakes.tiny_model import tiny_adapter, tiny_model


def node(data_dir: Path, **learning: Any) -> EdgeSettings:
    sdft = {"enabled": True, "max_answer_tokens": 3, "learning_rate": 1e-2}
    settings = make_node(data_dir, sdft=sdft, round_decay=1.0, **learning)
    release = activate(settings, tiny_adapter(5, strength=0.3), version=1)
    meet(settings, release.label, 8)
    return settings


def divergence(model: Any, start: Any, lessons: list[Lesson]) -> float:
    """KL(teacher || model) of the first token, nats, mean."""
    total = 0.0
    for one in lessons:
        shown = distilling.demonstrated(one.prompt_ids, one.target_ids)
        with torch.no_grad():
            mine = model(torch.tensor([list(one.prompt_ids)])).logits[0, -1].log_softmax(-1)
            teacher = start(torch.tensor([shown])).logits[0, -1].log_softmax(-1)
        total += float((teacher.exp() * (teacher - mine)).sum())
    return total / len(lessons)


@pytest.mark.slow
def test_a_round_learns_what_the_release_says_with_the_answer_in_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distilling, "usefulness", lambda *_: 1.0)
    settings = node(tmp_path / "node", steps=24, batch_anchor=0)
    plan = Worker(settings, NODE_ID)._next_round()
    assert plan is not None
    release = release_directory(settings.data_dir, plan.release_id)
    place = find_workplace(plan, settings, release, tmp_path / "w")
    trained = train_on_experience(plan, settings, place)
    start = load_start(tiny_model(), release)
    lessons = own_lessons(ExperienceStore(settings.data_dir / "experience.db"), plan)
    before = divergence(start, start, lessons)
    assert divergence(trained.model.eval(), start, lessons) < 0.85 * before


@pytest.mark.slow
@pytest.mark.parametrize("samples", [False, True], ids=["environment", "samples"])
def test_a_round_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: bool
) -> None:
    """Beside an anchor environment, and beside the base's own samples."""
    monkeypatch.setattr(distilling, "usefulness", lambda *_: 1.0)
    anchors = make_tiny_anchors(tmp_path / "anchors") if samples else None
    settings = node(tmp_path / "node", steps=16, checkpoint_steps=5, anchors=anchors)
    assert Worker(settings, NODE_ID).step()
    plan = RoundStore(settings.data_dir / "learning").last()
    assert plan is not None
    assert plan.distil is not None
    (entry,) = outbox_of(settings).list()
    payload = outbox_of(settings).payload_path(entry.round_id).read_bytes()
    metrics = UpdateManifest.from_bytes(outbox_of(settings).signed(entry.update_id)[0]).metrics
    assert (metrics["sdft"], metrics["examples"], metrics["steps"]) == (1, 8, 16)
    assert metrics["divergence_last"] > 0
    assert metrics["kl_release"] > 0
    assert ("kl_last" in metrics) is samples
    release = release_directory(settings.data_dir, plan.release_id)
    place, steps = find_workplace(plan, settings, release, tmp_path / "w"), iter(range(7))
    with pytest.raises(RoundObsolete):
        train_on_experience(
            plan, settings, replace(place, obsolete=lambda: next(steps, None) is None)
        )
    assert [path.name for path in (tmp_path / "w").glob("check*")] == ["checkpoint-5"]
    again = train_on_experience(plan, settings, place)
    assert encode(again.tensors) == payload


def test_a_model_that_cannot_use_a_demonstration_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distilling, "usefulness", lambda *_: -0.25)
    settings = node(tmp_path, steps=2)
    assert Worker(settings, NODE_ID).step()
    assert not outbox_of(settings).list()
    (problem,) = Problems(settings.data_dir).current()
    assert "the answer becomes likelier by -0.25 nats a token" in problem.text


def test_examples_that_do_not_fit_twice_are_left_out(tmp_path: Path) -> None:
    settings = node(tmp_path, steps=2)
    serving = settings.serving.model_copy(update={"max_model_len": 15})
    assert Worker(settings.model_copy(update={"serving": serving}), NODE_ID).step()
    (problem,) = Problems(settings.data_dir).current()
    assert "no example fits: its prompt twice, its answer and 3 tokens more" in problem.text


def test_how_useful_a_demonstration_is() -> None:
    """Of a model that repeats what followed the same token before, and else knows nothing."""

    class Repeats:
        device = torch.device("cpu")

        def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            ids = input_ids[0].tolist()
            logits = torch.zeros(1, len(ids), 9)
            for place, token in enumerate(ids):
                if token in ids[:place]:
                    logits[0, place, ids[ids.index(token) + 1]] = 9.0
            return type("Output", (), {"logits": logits})

    found = distilling.usefulness(Repeats(), [Lesson([3, 4], [5, 6])])
    assert found == pytest.approx(2.197, abs=0.01), "ln 9 of a token, and the other is as likely"


def test_rounds_of_cross_entropy_have_the_bytes_of_before(tmp_path: Path) -> None:
    plan = Worker(node(tmp_path), NODE_ID)._next_round()
    assert plan is not None
    assert b'"distil"' in plan.to_bytes()
    assert b'"distil"' not in plan.model_copy(update={"distil": None}).to_bytes()
