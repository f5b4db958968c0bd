from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from edge_node.learning.plans import RoundPlan
from edge_node.learning.policies import side_by_side
from edge_node.learning.records import RoundStore
from protos.lora import LoraModule, LoraTensors

BEFORE = (
    b'{"alpha":16.0,"anchor_pool":1000,"anchor_seed":0,"batch_anchor":8,"batch_hard":4,'
    b'"batch_own":12,"checkpoint_steps":10,"created_at":"2026-11-22T00:00:00.000+00:00",'
    b'"cursor":7,"label":"v0-01234567","learning_rate":0.005,"max_examples":4000,"number":1,'
    b'"payload_digest":"b","rank":8,"release_id":"a","release_rank":0,'
    b'"round_id":"r000001-v0-01234567","schema_version":1,"seed":5,"steps":50}'
)
"""A plan as software without grpo rounds stored it."""


def module(seed: int, rank: int, scale: float = 1.0) -> LoraModule:
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(rank, 6)), draw.normal(size=(5, rank))
    return LoraModule(a.astype(np.float32), b.astype(np.float32), scale)


def dense(tensors: LoraTensors, name: str) -> np.ndarray:
    one = tensors.modules.get(name)
    return np.zeros((5, 6)) if one is None else one.scale * one.B.astype(float) @ one.A


@pytest.mark.parametrize("name", ["in both", "release only", "increment only"])
def test_factors_side_by_side_are_the_sum(name: str) -> None:
    release = LoraTensors({"in both": module(1, 3), "release only": module(2, 2)})
    increment = LoraTensors({"in both": module(3, 2, 2.5), "increment only": module(4, 2, 0.5)})
    both = side_by_side(release, increment)
    expected = dense(release, name) + dense(increment, name)
    np.testing.assert_allclose(dense(both, name), expected, atol=1e-5)
    assert both.rank == 5
    assert {one.scale for one in both.modules.values()} == {1.0}


def test_a_plan_from_before_is_an_sft_round(tmp_path: Path) -> None:
    store = RoundStore(tmp_path)
    plan = RoundPlan.model_validate_json(BEFORE)
    store.begin(plan)
    with sqlite3.connect(tmp_path / "rounds.db") as database:
        database.execute("UPDATE rounds SET plan = ?", (BEFORE,))
    read = store.unfinished()
    assert read == plan
    assert read is not None
    assert (read.method, read.grpo) == ("sft", None)
    assert b"grpo" not in read.to_bytes(), "older software reads an sft plan of this one"


def test_how_rounds_of_a_release_ended(tmp_path: Path) -> None:
    store = RoundStore(tmp_path)
    plan = RoundPlan.model_validate_json(BEFORE)
    assert store.ends(1) == []
    ends = [
        (lambda name: store.give_up(name, "no better"), "given up", False),
        (lambda name: store.abandon(name, "broken"), "abandoned", False),
        (lambda name: store.end_unrewarded(name, "all zero"), "no reward", False),
        (lambda name: store.saturate(name, "all alike"), "nothing to gain", True),
    ]
    for number, (end, state, explored) in enumerate(ends, 1):
        name = f"r{number}"
        store.begin(plan.model_copy(update={"number": number, "round_id": name}))
        assert not store.explored("a")
        end(name)
        (found,) = store.ends(1)
        assert (found.plan.round_id, found.state) == (name, state)
        assert store.explored("a") is explored
        assert store.unrewarded("a") is (number > 2)
    assert not store.explored("another release")
