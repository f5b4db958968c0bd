"""What a virtual node answers and how likely it finds texts, without vLLM.

In: the base model, releases, environments. Out: paired outcomes in the fields of
lorikeet.releases.v1.EnvironmentResult. Tasks, texts and answers stay here. Importing this module
loads torch. A serving node asks its own
endpoint (edge_node/releases/evaluation.py); this module asks transformers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edge_node.environments import (
    Agents,
    Document,
    Environment,
    EnvironmentProcess,
    Episodes,
    Task,
    TextEnvironment,
)
from edge_node.errors import SettingsError
from edge_node.learning.training import load_start
from edge_node.releases.likelihood import MAX_TOKENS, Measured, mean_of, paired
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
    """An environment's part of an offer: `tasks` held-out tasks after the first `first_task`."""

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
    """Outcomes of `candidate` and each environment's reference on the same tasks.

    releases: factors by the names that `candidate` and `offered` use.
    """
    with ExitStack() as held:
        processes = [
            held.enter_context(EnvironmentProcess(spec)) for spec in specs if spec.name in offered
        ]
        return _compare(base, releases, candidate, processes, offered, seed)


def _compare(
    base: Path,
    releases: Mapping[str, LoraTensors],
    candidate: str,
    processes: Iterable[EnvironmentProcess],
    offered: Mapping[str, Comparison],
    seed: int,
) -> list[dict[str, Any]]:
    suites: dict[str, _Suite] = {}
    for process in processes:
        spec, environment = process.spec, process.environment()
        if isinstance(environment, Episodes | Agents):
            raise SettingsError(
                f"Environment {spec.name!r} has tools or agents, and a virtual node has no vLLM "
                "that plays its episodes. Take it out of the simulation."
            )
        part = offered[spec.name]
        draw = (
            environment.documents if isinstance(environment, TextEnvironment) else environment.tasks
        )
        items = draw("held_out", count=part.first_task + part.tasks, seed=seed)
        suites[spec.name] = _Suite(spec, environment, items[part.first_task :])
    found: dict[str, dict[str, Sequence[Any]]] = {}  # release -> environment -> item by item
    for release in sorted({candidate, *(offered[name].reference for name in suites)}):
        wanted = [name for name in suites if release in (candidate, offered[name].reference)]
        served = _Served(base, releases[release], release)
        found[release] = {name: served.measure(suites[name]) for name in wanted}
    return [
        suite.result(found[offered[name].reference][name], found[candidate][name])
        for name, suite in sorted(suites.items())
    ]


@dataclass(frozen=True)
class _Suite:
    """items: Tasks or Documents, as the environment has them."""

    spec: EnvironmentSpec
    environment: Environment | TextEnvironment
    items: Sequence[Any]

    def result(self, reference: Sequence[Any], candidate: Sequence[Any]) -> dict[str, Any]:
        """From what `_Served.measure` gave for both."""
        of_texts = isinstance(self.environment, TextEnvironment)
        pairs = [] if of_texts else list(zip(reference, candidate, strict=True))
        fields = {
            "environment": self.spec.name,
            "tasks_digest": sha256_hex(canonical_json([item.id for item in self.items])),
            "anchor": self.spec.anchor,
            "both_passed": pairs.count((True, True)),
            "only_reference_passed": pairs.count((True, False)),
            "only_candidate_passed": pairs.count((False, True)),
            "neither_passed": pairs.count((False, False)),
        }
        if of_texts and self.items:
            message = paired(reference, candidate)
            fields["likelihood"] = {
                field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields
            }
        return fields


class _Served:
    def __init__(self, base: Path, release: LoraTensors, name: str) -> None:
        self._name = name
        with tempfile.TemporaryDirectory() as folder:
            for name, data in peft_files(release, read_layout(base).module_shapes).items():
                (Path(folder) / name).write_bytes(data)
            self._model = load_start(base, Path(folder) if release.modules else None).eval()
        self._renderer = load_renderer(base)

    def measure(self, suite: _Suite) -> Sequence[Any]:
        """Task by task whether it passed, or document by document what was Measured."""
        if isinstance(suite.environment, TextEnvironment):
            return [self._likelihood(suite.spec.name, document) for document in suite.items]
        return self._passed(suite.environment, suite.items)

    def _likelihood(self, environment: str, document: Document) -> Measured:
        longest = min(MAX_TOKENS, self._model.config.max_position_embeddings)
        ids = self._renderer.tokenizer(document.text)["input_ids"][:longest]
        with torch.inference_mode():
            logits = self._model(torch.tensor([ids])).logits[0, :-1]
        found = torch.log_softmax(logits.float(), dim=-1)
        values = found.gather(1, torch.tensor(ids[1:], dtype=torch.int64)[:, None])[:, 0]
        return mean_of(values.tolist(), environment, document, self._name)

    def _passed(self, environment: Environment, tasks: Sequence[Task]) -> list[bool]:
        tokenizer = self._renderer.tokenizer
        prompts = [self._renderer.prompt_ids(task.messages) for task in tasks]
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            ids = self._model.generate(**asked, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        answers = tokenizer.batch_decode(
            ids[:, asked["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return [
            environment.verify(task, answer).passed
            for task, answer in zip(tasks, answers, strict=True)
        ]
