"""What a round replays, and what becomes of it when something is deleted meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_node.experience import ExperienceStore
from edge_node.learning.records import RoundStore
from edge_node.learning.round import own_lessons, release_directory, train_on_experience
from edge_node.learning.steering import NodeSteering
from edge_node.learning.training import RoundObsolete
from edge_node.learning.worker import Worker
from edge_node.learning.workplace import find_workplace
from edge_node.settings import EdgeSettings
from protos.lora import LoraTensors
from tests.contract.learning_round.outboxes import outbox_of
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, make_node, meet
from tests.fakes.tiny_model import prompt_ids


def node_with_history(path: Path) -> tuple[EdgeSettings, ExperienceStore]:
    """40 answers of an earlier release, then 6 of the one that it serves."""
    settings = make_node(path, steps=4, batch_own=4, batch_replay=2, max_examples=6)
    release = activate(settings, LoraTensors(), version=2)
    meet(settings, "v1-00000000", 40, first=100)
    meet(settings, release.label, 6)
    return settings, ExperienceStore(settings.data_dir / "experience.db")


def test_a_round_holds_old_examples_beside_the_newest(tmp_path: Path) -> None:
    settings, store = node_with_history(tmp_path)
    worker = Worker(settings, NODE_ID)
    plan = worker._next_round()
    assert plan is not None
    lessons = own_lessons(store, plan)
    assert [(lesson.recent, lesson.replayed) for lesson in lessons] == [(True, False)] * 6 + [
        (False, True)
    ] * 8
    meet(settings, "v1-00000000", 5, first=200)  # after the plan
    assert own_lessons(store, plan) == lessons
    assert worker.step()
    (entry,) = outbox_of(settings).list()
    assert entry.round_id == plan.round_id


@pytest.mark.parametrize("trains", [False, True])
def test_a_round_that_may_hold_what_was_deleted_is_given_up(tmp_path: Path, trains: bool) -> None:
    settings, store = node_with_history(tmp_path)
    plan = Worker(settings, NODE_ID)._next_round()
    assert plan is not None
    if trains:
        beats: list[None] = []

        def beat() -> None:
            beats.append(None)
            if len(beats) == 10:
                store.delete("chat-100")

        start = release_directory(settings.data_dir, plan.release_id)
        place = find_workplace(plan, settings, start, tmp_path / "w", beat=beat)
        with pytest.raises(RoundObsolete, match="after step 1 of 4"):
            train_on_experience(plan, settings, place)
    else:  # between two runs of the worker
        store.delete("chat-100")
    assert Worker(settings, NODE_ID).step()
    (end,) = RoundStore(settings.data_dir / "learning").ends()
    assert (end.state, outbox_of(settings).list()) == ("given up", [])
    everything = plan.model_copy(update={"max_examples": 99, "steps": 99})
    prompts = [lesson.prompt_ids for lesson in own_lessons(store, everything)]
    assert len(prompts) == 45
    assert prompt_ids("w100 w101 w102") not in prompts


@pytest.mark.parametrize("known", [True, False])
def test_a_round_is_given_up_for_feedback_that_it_knew_alone(tmp_path: Path, known: bool) -> None:
    settings, store = node_with_history(tmp_path)
    plan = Worker(settings, NODE_ID)._next_round()
    assert plan is not None
    meet(settings, "v1-00000000", 1, first=200)  # after the plan
    (told,) = store.said_of("chat-100" if known else "chat-200")
    store.withdraw(told.id)
    assert Worker(settings, NODE_ID).step()
    (end,) = RoundStore(settings.data_dir / "learning").ends()
    sent = len(outbox_of(settings).list())
    assert (end.state, sent) == (("given up", 0) if known else ("finished", 1))
    everything = plan.model_copy(update={"max_examples": 99, "steps": 99, "cursor": 99})
    assert len(own_lessons(store, everything)) == 46


def test_a_deletion_while_a_round_is_handed_over_keeps_its_update_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next round learns from what is left, without any further feedback."""
    settings, store = node_with_history(tmp_path)
    hand_over = NodeSteering.handing_over

    def deleted(self: NodeSteering) -> Any:
        store.delete("chat-100")
        return hand_over(self)

    with monkeypatch.context() as patches:
        patches.setattr(NodeSteering, "handing_over", deleted)
        assert Worker(settings, NODE_ID).step()
    (end,) = RoundStore(settings.data_dir / "learning").ends()
    assert (end.state, outbox_of(settings).list()) == ("given up", [])
    assert Worker(settings, NODE_ID).step()
    (entry,) = outbox_of(settings).list()
    assert entry.round_id != end.plan.round_id
