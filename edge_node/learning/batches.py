"""Examples -> fixed batches.

In: own and anchor examples in token ids, a plan. Out: `TokenRow`s in training order, the loss on
the answer only. Own examples are the ids that were served; anchors are rendered as vLLM renders
(`edge_node/rendering.py`), or the base wrote them. Nothing is cut here, and nothing is left out:
what cannot be used is no example. The same plan and examples give the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from edge_node.experience import Pair, Thumb
from edge_node.learning.anchors import KINDS, Sample
from edge_node.learning.plans import RoundPlan

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
    sample: int | None = None
    """Which sample of the base's own it is (`anchors.py`); None: it is not one."""
    recent: bool = True
    """Among the newest own examples."""
    replayed: bool = False
    """Drawn from what earlier releases answered."""


@dataclass(frozen=True)
class TokenRow:
    """input_ids and labels, int, equally long; labels are IGNORED where nothing is learnt.

    sample: as in Lesson.
    """

    input_ids: list[int]
    labels: list[int]
    sample: int | None = None


@dataclass(frozen=True)
class Batches:
    """rows: the round's, batch by batch. own, anchors: the number of distinct examples in them."""

    rows: list[TokenRow]
    own: int
    anchors: int


def token_row(lesson: Lesson) -> TokenRow:
    """The row of `lesson`. One of the base's own samples has no labels: no answer is learnt."""
    prompt, target = list(lesson.prompt_ids), list(lesson.target_ids)
    labels = target if lesson.sample is None else [IGNORED] * len(target)
    return TokenRow(prompt + target, [IGNORED] * len(prompt) + labels, lesson.sample)


def sample_lessons(samples: Sequence[Sample]) -> dict[str, list[Lesson]]:
    """The base's own samples by kind; a kind without samples is left out."""
    made: dict[str, list[Lesson]] = {}
    for kind in KINDS:
        for number, sample in enumerate(samples):
            if sample.kind == kind:
                prompt, answer = sample.ids[: sample.prompt], sample.ids[sample.prompt :]
                made.setdefault(kind, []).append(Lesson(prompt, answer, sample=number))
    return made


def make_batches(
    plan: RoundPlan, own: Sequence[Lesson], anchors: Mapping[str, Sequence[Lesson]]
) -> Batches:
    """The round's rows in order: `steps` batches of batch_own own and batch_anchor anchor rows.

    The anchor rows come from each kind of `anchors` in equal parts, a remainder from the first.

    Of the own rows, batch_hard come from the hard examples alone, where there are any (prioritised
    replay, arXiv:1511.05952, with two classes instead of priorities), and batch_replay from the
    replayed ones alone, where there are any, but no more than from the recent ones. Within each
    kind every example is drawn once before any is drawn again. There is a recent example, and no
    kind of anchors is empty; without anchors a batch holds own rows only.
    """
    recent = [index for index, lesson in enumerate(own) if lesson.recent]
    hard = [index for index, lesson in enumerate(own) if lesson.hard]
    replayed = [index for index, lesson in enumerate(own) if lesson.replayed]
    batch_hard = plan.batch_hard if hard else 0
    batch_replay = min(plan.batch_replay, (plan.batch_own - batch_hard) // 2) if replayed else 0
    own_stream = _shuffled_forever(recent, random.Random(f"{plan.seed}/own"))
    hard_stream = _shuffled_forever(hard, random.Random(f"{plan.seed}/hard"))
    replay_stream = _shuffled_forever(replayed, random.Random(f"{plan.seed}/replay"))
    beside_stream = _anchor_batches(plan, anchors)
    rows: list[TokenRow] = []
    own_used: set[int] = set()
    anchors_used: set[tuple[str, int]] = set()
    for _ in range(plan.steps):
        drawn = [next(hard_stream) for _ in range(batch_hard)]
        drawn += [next(replay_stream) for _ in range(batch_replay)]
        drawn += [next(own_stream) for _ in range(plan.batch_own - batch_hard - batch_replay)]
        beside = next(beside_stream)
        rows += [token_row(own[index]) for index in drawn] + [
            token_row(anchors[kind][index]) for kind, index in beside
        ]
        own_used.update(drawn)
        anchors_used.update(beside)
    return Batches(rows, len(own_used), len(anchors_used))


def anchor_batches(
    plan: RoundPlan, anchors: Mapping[str, Sequence[Lesson]]
) -> list[list[TokenRow]]:
    """The anchor rows of each step, drawn as in `make_batches`."""
    drawn = _anchor_batches(plan, anchors)
    return [
        [token_row(anchors[kind][index]) for kind, index in next(drawn)] for _ in range(plan.steps)
    ]


def _anchor_batches(
    plan: RoundPlan, anchors: Mapping[str, Sequence[Lesson]]
) -> Iterator[list[tuple[str, int]]]:
    """Kind and number of a step's anchors, step after step."""
    streams = [
        _shuffled_forever(
            [(kind, index) for index in range(len(lessons))], random.Random(f"{plan.seed}/{kind}")
        )
        for kind, lessons in anchors.items()
    ]
    while True:
        yield [
            next(stream)
            for stream, count in zip(streams, _equal_parts(plan, anchors), strict=True)
            for _ in range(count)
        ]


def pair_batches(plan: RoundPlan, pairs: Sequence[Pair]) -> list[list[Pair]]:
    """`batch` preferences a step; each is drawn once before any is drawn again."""
    assert plan.feedback is not None
    stream = _shuffled_forever(pairs, random.Random(f"{plan.seed}/pairs"))
    return [[next(stream) for _ in range(plan.feedback.batch)] for _ in range(plan.steps)]


def thumb_batches(plan: RoundPlan, thumbs: Sequence[Thumb]) -> list[list[Thumb]]:
    """`batch` thumbs a step, half of them liked (an odd one is disliked); drawn as pairs are.

    There is at least one of either.
    """
    assert plan.feedback is not None
    liked, disliked = (
        _shuffled_forever(
            [one for one in thumbs if one.liked is wanted],
            random.Random(f"{plan.seed}/thumbs/{wanted}"),
        )
        for wanted in (True, False)
    )
    good = plan.feedback.batch // 2
    return [
        [next(liked) for _ in range(good)]
        + [next(disliked) for _ in range(plan.feedback.batch - good)]
        for _ in range(plan.steps)
    ]


def _equal_parts(plan: RoundPlan, anchors: Mapping[str, Sequence[Lesson]]) -> list[int]:
    """Anchor rows in a batch, kind by kind."""
    each, more = divmod(plan.batch_anchor, len(anchors)) if anchors else (0, 0)
    return [each + (number < more) for number in range(len(anchors))]


def _shuffled_forever(items: Sequence[T], generator: random.Random) -> Iterator[T]:
    while True:
        yield from generator.sample(items, len(items))
