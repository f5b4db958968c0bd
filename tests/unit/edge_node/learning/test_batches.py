"""Batches of lessons: prompt `[number]`, target `[100 + number, END]`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from edge_node.experience import Pair, Thumb
from edge_node.learning.anchors import Sample
from edge_node.learning.batches import (
    IGNORED,
    Lesson,
    TokenRow,
    anchor_batches,
    make_batches,
    pair_batches,
    sample_lessons,
    thumb_batches,
    token_row,
)
from edge_node.learning.feedback_plan import FeedbackPlan
from edge_node.learning.plans import RoundPlan
from tests.unit.edge_node.learning.test_records import make_plan

END = 2


def lessons(first: int, count: int, *, hard: bool = False) -> list[Lesson]:
    return [Lesson((number,), (100 + number, END), hard) for number in range(first, first + count)]


def numbers(rows: list[TokenRow]) -> list[int]:
    return [row.input_ids[0] for row in rows]


def anchors(first: int, count: int) -> dict[str, list[Lesson]]:
    return {"anchor": lessons(first, count)}


def plan(**changes: Any) -> RoundPlan:
    return make_plan().model_copy(update=changes)


def test_loss_is_on_the_target_alone() -> None:
    row = token_row(Lesson((5, 6, 7), (8, END)))
    assert (row.input_ids, row.labels) == ([5, 6, 7, 8, END], [IGNORED, IGNORED, IGNORED, 8, END])
    row = token_row(Lesson((5, 6), (8, END), sample=3))
    assert (row.input_ids, row.labels, row.sample) == ([5, 6, 8, END], [IGNORED] * 4, 3)


def test_every_batch_mixes_own_and_anchor_examples_and_draws_each_once_before_any_twice() -> None:
    made = make_batches(plan(steps=4, batch_own=3, batch_anchor=2), lessons(0, 6), anchors(50, 5))
    drawn = numbers(made.rows)
    assert len(drawn) == 20
    for batch in range(4):
        assert [number < 50 for number in drawn[5 * batch : 5 * batch + 5]] == [
            True,
            True,
            True,
            False,
            False,
        ]
    assert set(Counter(number for number in drawn if number < 50).values()) == {2}
    assert max(Counter(number for number in drawn if number >= 50).values()) == 2
    assert (made.own, made.anchors) == (6, 5)


@pytest.mark.parametrize(
    ("batch_anchor", "kinds", "parts"),
    [
        (6, "plain open qa", {"plain": 2, "open": 2, "qa": 2}),
        (5, "plain open qa", {"plain": 2, "open": 2, "qa": 1}),
        (4, "plain open qa", {"plain": 2, "open": 1, "qa": 1}),
        (2, "plain open qa", {"plain": 1, "open": 1}),
        (6, "open qa", {"open": 3, "qa": 3}),
        (6, "qa", {"qa": 6}),
    ],
)
def test_the_kinds_of_the_bases_own_samples_have_equal_parts(
    batch_anchor: int, kinds: str, parts: dict[str, int]
) -> None:
    numbers_of = {"qa": range(4), "open": range(10, 16), "plain": range(20, 28)}
    samples = [
        Sample(kind=kind, ids=[number, 100 + number, END], prompt=1)
        for kind in kinds.split()
        for number in numbers_of[kind]
    ]
    made = make_batches(
        plan(steps=8, batch_own=1, batch_anchor=batch_anchor),
        lessons(50, 9),
        sample_lessons(samples),
    )
    size = 1 + batch_anchor
    for batch in range(8):
        rows = made.rows[size * batch : size * batch + size]
        assert [row.sample is None for row in rows] == [True] + [False] * batch_anchor
        drawn = [samples[row.sample] for row in rows if row.sample is not None]
        assert [row.input_ids for row in rows[1:]] == [sample.ids for sample in drawn]
        assert Counter(sample.kind for sample in drawn) == parts
    for kind, count in parts.items():
        seen = Counter(n for n in numbers(made.rows) if n in numbers_of[kind])
        assert max(seen.values()) - min(seen.values()) <= 1, "each once before any twice"
        assert len(seen) == min(len(numbers_of[kind]), 8 * count)
    assert made.anchors == sum(
        min(len(numbers_of[kind]), 8 * count) for kind, count in parts.items()
    )


def test_the_count_is_of_what_was_drawn() -> None:
    made = make_batches(plan(steps=2, batch_own=3, batch_anchor=1), lessons(0, 40), anchors(50, 40))
    assert (made.own, made.anchors) == (6, 2)
    hard = make_batches(
        plan(steps=9, batch_own=2, batch_hard=2), lessons(0, 30) + lessons(30, 2, hard=True), {}
    )
    assert (set(numbers(hard.rows)), hard.own, hard.anchors) == ({30, 31}, 2, 0)


def test_what_the_start_release_got_wrong_is_met_more_often() -> None:
    own = lessons(0, 30) + lessons(30, 2, hard=True)

    def hard_in_batches(batch_hard: int, own: list[Lesson]) -> list[int]:
        drawn = numbers(
            make_batches(plan(steps=4, batch_own=4, batch_hard=batch_hard), own, {}).rows
        )
        assert len(drawn) == 16
        return [
            sum(number >= 30 for number in drawn[4 * batch : 4 * batch + 4]) for batch in range(4)
        ]

    assert min(hard_in_batches(2, own)) >= 2
    assert sum(hard_in_batches(0, own)) <= 2, "without, each is drawn once before any twice"
    assert hard_in_batches(2, own[:30]) == [0, 0, 0, 0], (
        "nothing was wrong: ordinary examples fill the batch"
    )


def test_rows_depend_on_the_plans_seed_alone() -> None:
    own = lessons(0, 20)
    first = make_batches(plan(seed=1), own, {}).rows
    assert first == make_batches(plan(seed=1), own, {}).rows
    assert first != make_batches(plan(seed=2), own, {}).rows
    assert len(first) == 50 * 12, "without anchors a batch holds own examples only"


def compared(method: str, batch: int, **changes: Any) -> RoundPlan:
    feedback = FeedbackPlan.model_validate({"method": method, "batch": batch, "beta": 0.1})
    return plan(feedback=feedback, **changes)


def test_each_pair_is_drawn_once_before_any_twice() -> None:
    pairs = [Pair((number,), (1, END), (3, END)) for number in range(6)]
    drawn = pair_batches(compared("dpo", 4, steps=3), pairs)
    assert [len(batch) for batch in drawn] == [4, 4, 4]
    assert set(Counter(pair for batch in drawn for pair in batch).values()) == {2}
    assert drawn == pair_batches(compared("dpo", 4, steps=3), pairs)
    assert drawn != pair_batches(compared("dpo", 4, steps=3, seed=1), pairs)


def test_a_batch_of_thumbs_has_as_many_of_either_however_many_there_are() -> None:
    thumbs = [Thumb((number,), (END,), liked=number == 0) for number in range(9)]
    drawn = thumb_batches(compared("kto", 5, steps=4), thumbs)
    assert {tuple(one.liked for one in batch) for batch in drawn} == {(True,) * 2 + (False,) * 3}
    disliked = Counter(one for batch in drawn for one in batch if not one.liked)
    assert set(disliked.values()) == {1, 2}


def test_anchors_alone_are_those_of_each_step() -> None:
    drawn = anchor_batches(plan(steps=3, batch_anchor=2), anchors(50, 6))
    assert [len(batch) for batch in drawn] == [2, 2, 2]
    assert sorted(numbers([row for batch in drawn for row in batch])) == list(range(50, 56))
    assert anchor_batches(plan(steps=3, batch_anchor=2), {}) == [[], [], []]


def test_what_earlier_releases_answered_is_replayed_however_old_it_is() -> None:
    recent = [replace(lesson, replayed=number < 2) for number, lesson in enumerate(lessons(0, 30))]
    old = [replace(lesson, recent=False, replayed=True) for lesson in lessons(30, 6)]
    hard = lessons(40, 3, hard=True)
    sizes = plan(steps=12, batch_own=6, batch_hard=1, batch_replay=2)
    made = make_batches(sizes, recent + old + hard, {})
    drawn = numbers(made.rows)
    for batch in range(12):
        rows = drawn[6 * batch : 6 * batch + 6]
        assert rows[0] >= 40
        assert all(number in (0, 1, *range(30, 36)) for number in rows[1:3])
        assert all(number not in range(30, 36) for number in rows[3:]), "no longer among the newest"
    assert set(Counter(n for n in drawn if 30 <= n < 36).values()) == {3}, "each once before twice"
    assert make_batches(sizes, recent + old + hard, {}) == made


def test_replay_leaves_room_for_what_is_new_and_is_nothing_where_nothing_is_old() -> None:
    old = [replace(lesson, recent=False, replayed=True) for lesson in lessons(30, 6)]
    sizes = plan(steps=4, batch_own=5, batch_hard=2, batch_replay=9)
    drawn = numbers(make_batches(sizes, lessons(0, 5) + old + lessons(40, 3, hard=True), {}).rows)
    kinds = ["hard" if n >= 40 else "old" if n >= 30 else "new" for n in drawn]
    # A hard one is among the newest too.
    assert kinds[:3] == kinds[5:8] == ["hard", "hard", "old"]
    assert kinds.count("old") == 4
    without = sizes.model_copy(update={"batch_replay": 0})
    assert make_batches(sizes, lessons(0, 5), {}) == make_batches(without, lessons(0, 5), {})
