"""Greedy answers of a virtual node, without vLLM (importing this module loads torch).

In: the base model, releases, environments. Out: paired outcomes in the fields of lorikeet.releases.v1.EnvironmentResult; tasks and
answers stay here. What a node does through its own endpoint (edge_node/releases/evaluation.py) is done here with transformers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edge_node.environments import Environment, Task, load_environment
from edge_node.learning.training import load_start
from edge_node.releases.peft_directory import peft_files
from edge_node.rendering import load_renderer
from edge_node.settings import EnvironmentSpec
from protos.base import read_layout
from protos.lora import LoraTensors
from protos.manifest import canonical_json, sha256_hex

MAX_NEW_TOKENS = 96
"""An answer that is longer counts as it is then: the tasks of a simulation have short ones."""


@dataclass(frozen=True)
class Comparison:
    """One environment's part of an evaluation offer: `tasks` held-out tasks after the first `first_task`."""

    reference: str
    first_task: int
    tasks: int


def compare(
    base: Path,
    releases: Mapping[str, LoraTensors],
    candidate: str,
    specs: Iterable[EnvironmentSpec],
    offered: Mapping[str, Comparison],
    seed: int,
) -> list[dict[str, Any]]:
    """Outcomes of `candidate` and of each environment's reference on the same tasks; `releases` by the names that stand in both."""
    suites: dict[str, tuple[EnvironmentSpec, Environment, Sequence[Task]]] = {}
    for spec in specs:
        if (part := offered.get(spec.name)) is not None:
            environment = load_environment(spec)
            tasks = environment.tasks("held_out", count=part.first_task + part.tasks, seed=seed)[part.first_task :]
            suites[spec.name] = spec, environment, tasks
    answered: dict[str, dict[str, list[bool]]] = {}  # release -> environment -> passed
    for release in sorted({candidate, *(offered[name].reference for name in suites)}):
        wanted = [name for name in suites if release in (candidate, offered[name].reference)]
        answers = _Answerer(base, releases[release])
        answered[release] = {name: answers.passed(*suites[name][1:]) for name in wanted}
    return [
        _result(spec, tasks, answered[offered[name].reference][name], answered[candidate][name])
        for name, (spec, _, tasks) in sorted(suites.items())
    ]


class _Answerer:
    def __init__(self, base: Path, release: LoraTensors) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, data in peft_files(release, read_layout(base).module_shapes).items():
                (Path(folder) / name).write_bytes(data)
            self._model = load_start(base, Path(folder) if release.modules else None).eval()
        self._renderer = load_renderer(base)

    def passed(self, environment: Environment, tasks: Sequence[Task]) -> list[bool]:
        tokenizer = self._renderer.tokenizer
        prompts = [self._renderer.prompt_ids(task.messages) for task in tasks]
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            ids = self._model.generate(**asked, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        answers = tokenizer.batch_decode(ids[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        return [environment.verify(task, answer).passed for task, answer in zip(tasks, answers, strict=True)]


def _result(
    spec: EnvironmentSpec, tasks: Sequence[Task], reference: Sequence[bool], candidate: Sequence[bool]
) -> dict[str, Any]:
    pairs = list(zip(reference, candidate, strict=True))
    return {
        "environment": spec.name,
        "tasks_digest": sha256_hex(canonical_json([task.id for task in tasks])),
        "anchor": spec.anchor,
        "both_passed": pairs.count((True, True)),
        "only_reference_passed": pairs.count((True, False)),
        "only_candidate_passed": pairs.count((False, True)),
        "neither_passed": pairs.count((False, False)),
    }
