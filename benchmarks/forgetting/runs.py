"""One run of `benchmarks.forgetting`: a rule and a seed, over all desks.

In: a `Run`. Out: success after each step, and right answers of several attempts at the end. With a
folder to keep it in, a run that was ended goes on.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.forgetting.federation import Federation, desks
from edge_node.settings import LearningSettings
from examples.quickstart.recipe import LEARNING
from lorikeet.durable import write_file

DESKS, EXAMPLES, TASKS = 8, 200, 100
"""Examples: of a node at each step. Tasks: held out, of each environment."""
SETTINGS = {"steps": 40, "round_decay": 1.0, "max_examples": EXAMPLES}
"""Beside the quickstart's recipe: a desk has half the words of its nodes, and nothing ends."""
SAMPLED_TASKS, ATTEMPTS = 20, 8
"""For pass^k of the last release, at temperature 1."""
RULES: Mapping[str, Mapping[str, int]] = {
    "replay and anchors": {},
    "anchors": {"batch_replay": 0},
    "sequential": {"batch_replay": 0, "batch_anchor": 0},
    "whole history": {"batch_replay": 0, "max_examples": 1_000_000},
}
"""Settings by rule. sequential: plain fine-tuning, with as many own examples and steps. whole
history: no replay; the newest examples are all that was ever met.
"""


@dataclass(frozen=True)
class Run:
    """One rule with one seed, `desks` desks long."""

    base: Path
    rule: str
    seed: int
    desks: int
    keep: Path | None


def run(job: Run) -> dict[str, Any]:
    """Success in percent after each step, and how many of ATTEMPTS answers to a task were right.

    It goes on after the last step that is kept.
    """
    if job.keep is not None:
        folder = job.keep / f"{job.rule.replace(' ', '-')}-{job.seed}-{job.desks}"
        folder.mkdir(parents=True, exist_ok=True)
        return _run(job, folder)
    with tempfile.TemporaryDirectory(prefix="lk-forgetting-") as temporary:
        return _run(job, Path(temporary))


def _run(job: Run, folder: Path) -> dict[str, Any]:
    kept = folder / "result.json"
    result: dict[str, Any] = {"success": [], "attempts_right": {}, "cpu_s": 0.0}
    if kept.is_file():
        result = json.loads(kept.read_text())
    rows = result["success"]
    if result["attempts_right"]:
        return result
    recipe = {key.removeprefix("EDGE_LEARNING__").lower(): text for key, text in LEARNING.items()}
    settings = {**recipe, **SETTINGS, "seed": job.seed, **RULES[job.rule]}
    learning = LearningSettings.model_validate(settings)
    company = desks(job.seed, job.desks)
    nodes = Federation(job.base, folder, learning, version=max(0, len(rows) - 1))
    everything = nodes.with_anchor(company)
    for step, desk in enumerate([None, *company.values()]):
        if step < len(rows):
            continue
        began = time.process_time()
        if desk is not None:
            nodes.meet(desk, EXAMPLES)
            nodes.learn()
        found = nodes.success(everything, TASKS)
        rows.append({name: round(100 * value, 2) for name, value in found.items()})
        result["cpu_s"] += round(time.process_time() - began, 1)
        write_file(kept, json.dumps(result).encode())
        line = " ".join(f"{value:.0f}" for value in rows[-1].values())
        print(f"seed {job.seed} {job.rule}, {step}: {line}", file=sys.stderr, flush=True)
    result["attempts_right"] = nodes.sampled(everything, SAMPLED_TASKS, ATTEMPTS)
    write_file(kept, json.dumps(result).encode())
    return result
