"""Two nodes that learn a company's desks one after the other, without servers.

In: the base, a seed, settings of learning. Out: releases, and their success. The experience store
with its choice of examples, the round (edge_node.learning) and the merge (central.merging) are the
real ones. Simulated are serving, feedback and the gate: each task's right answer is a correction of
the release of that time, and every merge is released.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from central.merging import merge
from edge_node.environments import Task
from edge_node.experience import ExperienceStore, Feedback, Interaction
from edge_node.learning.batches import Lesson
from edge_node.learning.plans import plan_round
from edge_node.releases.peft_directory import peft_files
from edge_node.rendering import Renderer, load_renderer
from edge_node.settings import LearningSettings
from examples.quickstart import house
from examples.quickstart.environments import PublicTenants, ToolApi
from lorikeet.durable import write_file
from protos.base import BaseModelInfo, read_base_model
from protos.lora import LoraTensors, decode, encode
from protos.manifest import Payload, ReleaseManifest, sha256_hex

NODES = 2
RANK = 32
"""central's default, of a release."""
ANCHOR = "public"
COMPANY = "acme"
ALIAS = "lorikeet"
LENGTH = 256
"""Tokens that the base reads."""
ANSWER = 48
"""Most tokens of an answer."""


def desks(seed: int, count: int) -> dict[str, ToolApi]:
    """`count` desks of one company, in the order in which they are met.

    Each has a service of its own, and draws three verbs, three sites and two priorities, so words
    meet again by chance.
    """
    draw = random.Random(f"desks/{seed}")
    book = {COMPANY: house.company_house(COMPANY, seed)}
    made = {}
    for number, service in enumerate(draw.sample(house.SERVICES, count), 1):
        words = house.Vocabulary(
            (service,),
            tuple(draw.sample(house.VERBS, 3)),
            tuple(draw.sample(house.SITES, 3)),
            tuple(draw.sample(house.PRIORITIES, 2)),
        )
        made[f"desk-{number}"] = ToolApi(f"desk-{number}", book, {COMPANY: words}, seed)
    return made


class Federation:
    """Two nodes and their newest release, which is that of `version`.

    All is in `folder`, which is empty for version 0.
    """

    def __init__(
        self, base: Path, folder: Path, learning: LearningSettings, version: int = 0
    ) -> None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        torch.set_num_threads(1)
        disable_progress_bar()
        self._base: BaseModelInfo = read_base_model(base)
        self._renderer: Renderer = load_renderer(base)
        self._learning = learning
        self._folder = folder
        self._stores = [
            ExperienceStore(folder / f"node-{node}" / "experience.db") for node in range(NODES)
        ]
        self._public = PublicTenants()
        pool = self._public.tasks("train", count=learning.anchor_pool, seed=learning.seed)
        self._anchors = [
            Lesson(
                self._renderer.prompt_ids(task.messages),
                self._renderer.answer_ids(self._public.reference_answer(task)),
            )
            for task in pool
        ]
        self._version = version
        self._tensors = decode(self._payload.read_bytes()) if version else LoraTensors()

    def meet(self, desk: ToolApi, examples: int) -> None:
        """Each node answers so many tasks of the desk, others than the other, and is corrected.

        A repeat changes nothing.
        """
        tasks = desk.tasks("train", count=NODES * examples, seed=self._learning.seed)
        for node, store in enumerate(self._stores):
            met = tasks[node::NODES]
            store.add_interactions([self._answered(task) for task in met])
            for task in met:
                right = desk.reference_answer(task)
                ids = tuple(self._renderer.answer_ids(right))
                said = Feedback(task.id, correction=right, correction_ids=ids)
                store.add_feedback(said, max_tokens=LENGTH)

    def learn(self) -> None:
        """Each node trains a round on the release, and central merges both."""
        increments = [self._train(node) for node in range(NODES)]
        share = 1 / len(increments)
        weighted = [(increment, share) for increment in increments]
        merged = merge(self._tensors, weighted, rank=RANK, server_step=1.0, seed=0)
        self._tensors, self._version = merged.tensors, self._version + 1
        write_file(self._payload, encode(self._tensors))

    def success(self, environments: Mapping[str, ToolApi], tasks: int) -> dict[str, float]:
        """Share of held-out tasks that greedy answers solve, by environment."""
        right = self._right(environments, tasks, attempts=1)
        return {name: sum(found) / tasks for name, found in right.items()}

    def sampled(
        self, environments: Mapping[str, ToolApi], tasks: int, attempts: int
    ) -> dict[str, list[int]]:
        """Of each held-out task, how many of so many answers at temperature 1 are right."""
        return self._right(environments, tasks, attempts)

    def with_anchor(self, met: Mapping[str, ToolApi]) -> dict[str, ToolApi]:
        return {**met, ANCHOR: self._public}

    def _right(
        self, environments: Mapping[str, ToolApi], tasks: int, attempts: int
    ) -> dict[str, list[int]]:
        from edge_node.learning.training import load_start

        with tempfile.TemporaryDirectory() as folder:
            model = load_start(self._base.path, self._directory(Path(folder))).eval()
        found = {}
        for name, environment in environments.items():
            asked = environment.tasks("held_out", count=tasks, seed=7)
            answers = self._answers(model, asked, attempts)
            passed = [
                environment.verify(asked[number // attempts], answer).passed
                for number, answer in enumerate(answers)
            ]
            found[name] = [
                sum(passed[first : first + attempts]) for first in range(0, len(passed), attempts)
            ]
        return found

    def _answers(self, model: Any, tasks: Sequence[Task], attempts: int) -> list[str]:
        """`attempts` answers to each task, task by task: greedy when it is one."""
        import torch

        torch.manual_seed(self._learning.seed)
        tokenizer = self._renderer.tokenizer
        prompts = [self._renderer.prompt_ids(task.messages) for task in tasks]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            ids = model.generate(
                **inputs, max_new_tokens=ANSWER, pad_token_id=tokenizer.pad_token_id,
                do_sample=attempts > 1, num_return_sequences=attempts,
            )  # fmt: skip
        answers: list[str] = tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return answers

    @property
    def _payload(self) -> Path:
        return self._folder / f"release-{self._version}.safetensors"

    def _train(self, node: int) -> LoraTensors:
        from edge_node.learning.round import own_lessons
        from edge_node.learning.training import train_round
        from edge_node.learning.workplace import Workplace

        store = self._stores[node]
        plan = plan_round(
            self._learning,
            number=self._version + 1,
            node_id=f"node-{node}",
            release=self._manifest(),
            cursor=store.cursor(),
            max_rank=None,
        )
        with tempfile.TemporaryDirectory() as folder:
            release = self._directory(Path(folder))
            return train_round(
                plan,
                Workplace(self._base.path, release, Path(folder) / "round"),
                own=own_lessons(store, plan),
                anchors=self._anchors if plan.batch_anchor else [],
            ).tensors

    def _directory(self, folder: Path) -> Path | None:
        """The release as nodes have it on disk; None for the base."""
        if not self._tensors.modules:
            return None
        release = folder / "release"
        release.mkdir()
        for name, data in peft_files(self._tensors, self._base.module_shapes).items():
            (release / name).write_bytes(data)
        return release

    def _answered(self, task: Task) -> Interaction:
        """Its answer is never read: it is corrected."""
        return Interaction(
            id=task.id, created_at="", model=f"{ALIAS}@{self._manifest().label}",
            messages=[], answer="", finish_reason="stop", endpoint="/v1/chat/completions",
            prompt_ids=tuple(self._renderer.prompt_ids(task.messages)), answer_ids=(),
        )  # fmt: skip

    def _manifest(self) -> ReleaseManifest:
        payload = encode(self._tensors)
        return ReleaseManifest(
            base=self._base.digest, cohort="benchmark", version=self._version, parent=None,
            plan=None, payload=Payload(digest_sha256=sha256_hex(payload), size_bytes=len(payload)),
            rank=self._tensors.rank, truncation_error=0.0, updates=[], created_at="",
        )  # fmt: skip
