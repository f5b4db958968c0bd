"""Examples -> fixed batches.

In: own and anchor examples in token ids, a plan. Out: `TokenRow`s in training order, the loss on
the answer only. Own examples are the ids that were served; anchors are rendered as vLLM renders
(`edge_node/rendering.py`). Nothing is cut here, and nothing is left out: what cannot be used is no
example. The same plan and examples give the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from edge_node.learning.records import RoundPlan

T = TypeVar("T")

IGNORED = -100
"""Label of a token without loss (the convention of torch and transformers)."""


@dataclass(frozen=True)
class Lesson:
    """A prompt and the answer to learn, in token ids; the answer to the token that ended it."""

    prompt_ids: Sequence[int]
    target_ids: Sequence[int]
    hard: bool = False
    """A correction of an answer by the release that the round starts from."""


@dataclass(frozen=True)
class TokenRow:
    """input_ids and labels, int, equally long; labels are IGNORED on the prompt."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Batches:
    """rows: the round's, batch by batch. own, anchors: how many distinct examples are among them."""

    rows: list[TokenRow]
    own: int
    anchors: int


def token_row(lesson: Lesson) -> TokenRow:
    prompt, target = list(lesson.prompt_ids), list(lesson.target_ids)
    return TokenRow(prompt + target, [IGNORED] * len(prompt) + target)


def make_batches(plan: RoundPlan, own: Sequence[Lesson], anchors: Sequence[Lesson]) -> Batches:
    """All rows of the round in order: `steps` batches of batch_own own and batch_anchor anchor
    rows.

    Of the own rows, batch_hard come from the hard examples alone, where there are any (prioritised
    replay, arXiv:1511.05952, with two classes instead of priorities). Within each kind every
    example is drawn once before any is drawn again. `own` is not empty; without anchors a batch
    holds own rows only.
    """
    hard = [index for index, lesson in enumerate(own) if lesson.hard]
    batch_hard = plan.batch_hard if hard else 0
    own_stream = _shuffled_forever(range(len(own)), random.Random(f"{plan.seed}/own"))
    hard_stream = _shuffled_forever(hard, random.Random(f"{plan.seed}/hard"))
    anchor_stream = _shuffled_forever(range(len(anchors)), random.Random(f"{plan.seed}/anchor"))
    rows: list[TokenRow] = []
    own_used: set[int] = set()
    anchors_used: set[int] = set()
    for _ in range(plan.steps):
        drawn = [next(hard_stream) for _ in range(batch_hard)]
        drawn += [next(own_stream) for _ in range(plan.batch_own - batch_hard)]
        beside = [next(anchor_stream) for _ in range(plan.batch_anchor)] if anchors else []
        rows += [token_row(own[index]) for index in drawn] + [token_row(anchors[index]) for index in beside]
        own_used.update(drawn)
        anchors_used.update(beside)
    return Batches(rows, len(own_used), len(anchors_used))


def _shuffled_forever(items: Sequence[T], generator: random.Random) -> Iterator[T]:
    while True:
        yield from generator.sample(items, len(items))
