"""The quickstart's problem without servers: rounds of its nodes, and what a release can do.

In: the base model, a seed. Out: increments of the node's own training (edge_node.learning, the
quickstart's recipe), and success on held-out tasks by greedy generation with transformers. A and B
are halves of a company's work, C is a third part that nobody trains, `base` what the base could do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_node.environments import Task
from edge_node.learning.batches import Lesson
from edge_node.learning.plans import plan_round
from edge_node.releases.peft_directory import peft_files
from edge_node.rendering import Renderer, load_renderer
from edge_node.settings import LearningSettings
from examples.quickstart.environments import CompanyApi, Node, PublicTenants, ToolApi
from examples.quickstart.recipe import FIRST_WAVE, LEARNING, NEXT_WAVE
from protos.base import BaseModelInfo, read_base_model
from protos.lora import LoraTensors, encode
from protos.manifest import Payload, ReleaseManifest, sha256_hex

TASKS = 100
"""Held-out tasks of each environment."""


class World:
    """The base model, the environments and what is drawn from them."""

    def __init__(self, base: Path, seed: int, tasks: int = TASKS) -> None:
        import torch

        torch.set_num_threads(1)
        self._base: BaseModelInfo = read_base_model(base)
        self.seed = seed
        self.tasks = tasks
        self._learning = LearningSettings.model_validate(
            {key.removeprefix("EDGE_LEARNING__").lower(): value for key, value in LEARNING.items()}
            | {"seed": seed}
        )
        self._renderer = load_renderer(base)
        public = PublicTenants()
        self._anchors = lessons(
            self._renderer,
            public,
            public.tasks("train", count=self._learning.anchor_pool, seed=seed),
        )
        companies: tuple[Node, ...] = ("A", "B", "C")
        self._companies: dict[str, CompanyApi] = {
            letter: CompanyApi(letter, seed=seed) for letter in companies
        }
        environments: dict[str, ToolApi] = {**self._companies, "base": public}
        self._held_out = {
            name: (environment, environment.tasks("held_out", count=tasks, seed=7))
            for name, environment in environments.items()
        }

    def train(
        self,
        nodes: str,
        number: int,
        start: LoraTensors,
        *,
        rank: int | None = None,
        version: int | None = None,
    ) -> LoraTensors:
        """The update of the node's round `number` from release `start`.

        Of several nodes ("AB"): that of one learner with the work of all, whose batches are as many
        times as large. rank: another than the recipe's. version: of the start, if not number - 1.
        """
        from edge_node.learning.training import train_round
        from edge_node.learning.workplace import Workplace

        met = FIRST_WAVE + NEXT_WAVE * (number - 1)
        learning, times = self._learning, len(nodes)
        sizes = {
            "batch_own": learning.batch_own * times,
            "batch_anchor": learning.batch_anchor * times,
        }
        plan = plan_round(
            learning.model_copy(update=sizes | {"rank": rank or learning.rank}),
            number=number,
            node_id=f"node-{nodes}",
            release=self._manifest(start, number - 1 if version is None else version),
            cursor=0,
            max_rank=None,
        )
        own = [
            lesson
            for company in map(self._companies.__getitem__, nodes)
            for lesson in lessons(
                self._renderer, company, company.tasks("train", count=met, seed=self.seed)
            )
        ]
        with tempfile.TemporaryDirectory() as folder:
            release = Path(folder) / "release"
            release.mkdir()
            for name, data in peft_files(start, self._base.module_shapes).items():
                (release / name).write_bytes(data)
            place = Workplace(
                self._base.path, release if start.modules else None, Path(folder) / "round"
            )
            return train_round(plan, place, own=own, anchors=self._anchors).tensors

    def success(self, release: LoraTensors) -> dict[str, int]:
        """Percent of held-out tasks that greedy answers under `release` solve, by environment."""
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            self._base.path, dtype=torch.float32
        ).eval()
        for name, module in release.modules.items():
            model.get_submodule(name).weight.data += torch.from_numpy(
                module.scale * (module.B @ module.A)
            )
        found = {}
        for name, (environment, tasks) in self._held_out.items():
            with torch.no_grad():
                answers = self._answers(model, tasks)
            passed = sum(
                environment.verify(task, answer).passed
                for task, answer in zip(tasks, answers, strict=True)
            )
            found[name] = round(100 * passed / len(tasks))
        return found

    def _answers(self, model: Any, tasks: Sequence[Task]) -> list[str]:
        tokenizer = self._renderer.tokenizer
        prompts = [self._renderer.prompt_ids(task.messages) for task in tasks]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        inputs.pop("token_type_ids", None)
        ids = model.generate(
            **inputs, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        answers: list[str] = tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return answers

    def _manifest(self, release: LoraTensors, version: int) -> ReleaseManifest:
        payload = encode(release)
        return ReleaseManifest(
            base=self._base.digest,
            cohort="benchmark",
            version=version,
            parent=None,
            plan=None,
            payload=Payload(digest_sha256=sha256_hex(payload), size_bytes=len(payload)),
            rank=release.rank,
            truncation_error=0.0,
            updates=[],
            created_at="",
        )


def lessons(renderer: Renderer, environment: ToolApi, tasks: Sequence[Task]) -> list[Lesson]:
    """Tasks with the answers that the environment knows."""
    answers = [(task, environment.reference_answer(task)) for task in tasks]
    return [
        Lesson(renderer.prompt_ids(task.messages), renderer.answer_ids(answer))
        for task, answer in answers
        if answer is not None
    ]
