"""Plans and exercises for grpo rounds on the tiny model, without a node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_node.environments import Environment
from edge_node.learning.exploration import make_exercises
from edge_node.learning.plans import GrpoPlan, RoundPlan
from edge_node.learning.rewards import Exercise
from edge_node.rendering import load_renderer
from tests.fakes.even_words import EvenWords
from tests.fakes.tiny_model import POSITIONS, tiny_model

SAMPLES = 8


def make_plan(**changes: Any) -> RoundPlan:
    grpo = GrpoPlan(
        environments=["even"], prompts=8, samples=SAMPLES, max_answer_tokens=2, temperature=1.0,
        beta=0.0,
    )  # fmt: skip
    fields: dict[str, Any] = {
        "number": 1, "round_id": "r000001-v0", "release_id": "a" * 64, "label": "v0",
        "payload_digest": "b" * 64, "release_rank": 0, "cursor": 0, "seed": 3, "rank": 4,
        "alpha": 8.0, "steps": 20, "batch_own": 1, "batch_hard": 0, "batch_anchor": 0,
        "anchor_pool": 1, "anchor_seed": 0, "learning_rate": 2e-2, "max_examples": 1,
        "checkpoint_steps": 2, "created_at": "2026-11-22T00:00:00+00:00", "grpo": grpo,
    }  # fmt: skip
    return RoundPlan(**fields | changes)


def exercises_of(plan: RoundPlan, environment: Environment | None = None) -> list[Exercise]:
    renderer = load_renderer(tiny_model())
    return make_exercises(plan, {"even": environment or EvenWords()}, renderer, POSITIONS)


def folder_for(path: Path, name: str) -> Path:
    folder = path / name
    folder.mkdir()
    return folder
