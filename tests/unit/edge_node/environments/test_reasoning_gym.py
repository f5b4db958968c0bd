"""The adapter of reasoning-gym, on a package that stands for it."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from edge_node.environments import Environment
from edge_node.environments.adapters.reasoning_gym import ReasoningGym


@dataclass
class Sums:
    """Questions `a + b` below `limit`."""

    seed: int
    size: int
    limit: int = 1000

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert index < self.size
        rng = random.Random(f"{self.seed}/{index}")
        a, b = rng.randrange(self.limit), rng.randrange(self.limit)
        answer = None if self.limit == 999 else str(a + b)
        return {"question": f"{a} + {b}?", "answer": answer, "metadata": {"pair": (a, b)}}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        special = {"nan": float("nan"), "high": 7.0, "low": -1.0}
        if answer in special:
            return special[answer]
        a, b = entry["metadata"]["pair"]
        return 1.0 if int(answer) == a + b else 0.01


def create_dataset(name: str, **config: Any) -> Sums:
    if name != "sums":
        raise ValueError(f"Dataset '{name}' not registered")
    return Sums(**config)


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("reasoning_gym")
    module.create_dataset = create_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)


def texts(environment: ReasoningGym, split: Any, count: int, seed: int = 0) -> list[str]:
    return [t.messages[0]["content"] for t in environment.tasks(split, count=count, seed=seed)]


def test_tasks_are_distinct_repeatable_and_begin_with_those_of_a_smaller_count() -> None:
    first, second = ReasoningGym("sums"), ReasoningGym("sums")
    assert isinstance(first, Environment)
    many = texts(first, "train", 900)
    assert len(set(many)) == 900
    assert texts(second, "train", 900) == many
    assert texts(second, "train", 7) == many[:7]
    assert texts(first, "train", 50, seed=1) != many[:50]
    assert texts(ReasoningGym("sums", seed=5), "train", 50) != many[:50]
    assert texts(first, "train", 0) == []


def test_splits_share_no_text_also_where_there_are_few() -> None:
    environment = ReasoningGym("sums", config={"limit": 6})
    train, held_out = (set(texts(environment, split, 1000)) for split in ("train", "held_out"))
    assert not train & held_out
    assert len(train) + len(held_out) == 36, "all there are, and then it ends"


@pytest.mark.parametrize(
    ("answer", "passed", "score"),
    [
        ("right", True, 1.0),
        (" right\n", True, 1.0),
        ("7000", False, 0.01),
        ("no number", False, 0.0),
        ("", False, 0.0),
        ("nan", False, 0.0),
        ("high", True, 1.0),
        ("low", False, 0.0),
    ],
)
def test_the_verdict_is_the_data_sets(answer: str, passed: bool, score: float) -> None:
    environment = ReasoningGym("sums")
    (task,) = environment.tasks("train", count=1, seed=0)
    right = environment.reference_answer(task)
    assert right is not None
    outcome = environment.verify(task, answer.replace("right", right))
    assert (outcome.passed, outcome.score) == (passed, score)
    assert outcome.correction == (None if passed else right)
    assert bool(outcome.reason) != passed


def test_the_last_number_of_an_answer_is_scored_where_that_is_asked() -> None:
    environment = ReasoningGym("sums", extract="last-number")
    (task,) = environment.tasks("train", count=1, seed=0)
    right = int(environment.reference_answer(task) or 0)
    assert environment.verify(task, f"First 3, then {right:,}.").passed
    assert not environment.verify(task, f"{right}, or 3").passed
    assert not environment.verify(task, "none").passed
    assert not ReasoningGym("sums").verify(task, f"It is {right}").passed


def test_a_data_set_without_answers_knows_none() -> None:
    environment = ReasoningGym("sums", config={"limit": 999})
    (task,) = environment.tasks("train", count=1, seed=0)
    assert environment.reference_answer(task) is None
    assert environment.verify(task, "0").correction is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dataset": "nothing"}, "Dataset 'nothing' not registered"),
        ({"dataset": "sums", "config": {"colour": 1}}, "does not take config {'colour': 1}"),
        ({"dataset": "sums", "config": {"seed": 1, "size": 2}}, "config has seed, size"),
        ({"dataset": "sums", "extract": "first"}, "expected whole or last-number"),
    ],
)
def test_a_mistake_in_the_options_is_named(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ReasoningGym(**options)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ModuleNotFoundError, match=r"lorikeet-federated\[reasoning-gym\]"):
        ReasoningGym("sums")
