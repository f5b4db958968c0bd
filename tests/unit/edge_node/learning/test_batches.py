"""Batches of lessons: prompt `[number]`, target `[100 + number, END]`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from edge_node.learning.batches import IGNORED, Lesson, TokenRow, make_batches, token_row
from edge_node.learning.records import RoundPlan
from tests.unit.edge_node.learning.test_records import make_plan

END = 2


def lessons(first: int, count: int, *, hard: bool = False) -> list[Lesson]:
    return [Lesson((number,), (100 + number, END), hard) for number in range(first, first + count)]


def numbers(rows: list[TokenRow]) -> list[int]:
    return [row.input_ids[0] for row in rows]


def plan(**changes: Any) -> RoundPlan:
    return make_plan().model_copy(update=changes)


def test_loss_is_on_the_target_alone() -> None:
    row = token_row(Lesson((5, 6, 7), (8, END)))
    assert (row.input_ids, row.labels) == ([5, 6, 7, 8, END], [IGNORED, IGNORED, IGNORED, 8, END])


def test_every_batch_mixes_own_and_anchor_examples_and_draws_each_once_before_any_twice() -> None:
    made = make_batches(plan(steps=4, batch_own=3, batch_anchor=2), lessons(0, 6), lessons(50, 5))
    drawn = numbers(made.rows)
    assert len(drawn) == 20
    for batch in range(4):
        assert [number < 50 for number in drawn[5 * batch : 5 * batch + 5]] == [True, True, True, False, False]
    assert set(Counter(number for number in drawn if number < 50).values()) == {2}
    assert max(Counter(number for number in drawn if number >= 50).values()) == 2
    assert (made.own, made.anchors) == (6, 5)


def test_the_count_is_of_what_was_drawn() -> None:
    made = make_batches(plan(steps=2, batch_own=3, batch_anchor=1), lessons(0, 40), lessons(50, 40))
    assert (made.own, made.anchors) == (6, 2)
    hard = make_batches(plan(steps=9, batch_own=2, batch_hard=2), lessons(0, 30) + lessons(30, 2, hard=True), [])
    assert (set(numbers(hard.rows)), hard.own, hard.anchors) == ({30, 31}, 2, 0)


def test_what_the_start_release_got_wrong_is_met_more_often() -> None:
    own = lessons(0, 30) + lessons(30, 2, hard=True)

    def hard_in_batches(batch_hard: int, own: list[Lesson]) -> list[int]:
        drawn = numbers(make_batches(plan(steps=4, batch_own=4, batch_hard=batch_hard), own, []).rows)
        assert len(drawn) == 16
        return [sum(number >= 30 for number in drawn[4 * batch : 4 * batch + 4]) for batch in range(4)]

    assert min(hard_in_batches(2, own)) >= 2
    assert sum(hard_in_batches(0, own)) <= 2, "without, each is drawn once before any twice"
    assert hard_in_batches(2, own[:30]) == [0, 0, 0, 0], "nothing was wrong: ordinary examples fill the batch"


def test_rows_depend_on_the_plans_seed_alone() -> None:
    own = lessons(0, 20)
    first = make_batches(plan(seed=1), own, []).rows
    assert first == make_batches(plan(seed=1), own, []).rows
    assert first != make_batches(plan(seed=2), own, []).rows
    assert len(first) == 50 * 12, "without anchors a batch holds own examples only"
