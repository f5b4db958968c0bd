"""Pooling of reports: which of several measurements of the same tasks speaks."""

from __future__ import annotations

import itertools

import pytest

from central.gate import pool


def make_report(node: str, lost: int, gained: int) -> tuple[str, list[dict[str, object]]]:
    """`node` measured the same 100 tasks; the candidate lost `lost` of them and gained `gained`."""
    counts = {
        "both_passed": 50 - lost,
        "only_reference_passed": lost,
        "only_candidate_passed": gained,
    }
    counts["neither_passed"] = 50 - gained
    return node, [{"environment": "desk", "tasks_digest": "same", "anchor": False, **counts}]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_of_three_that_measured_the_same_tasks_the_median_speaks(order: tuple[int, ...]) -> None:
    """One dishonest node neither clears a candidate nor condemns it, wherever its report stands."""
    for dishonest in (make_report("liar", 0, 40), make_report("liar", 40, 0)):
        reports = [make_report("a", 10, 0), make_report("b", 12, 0), dishonest]
        [counts] = pool([reports[index] for index in order])
        assert counts.only_reference in (10, 12)
        assert counts.nodes == 3


def test_of_two_the_larger_fall_speaks() -> None:
    [counts] = pool([make_report("a", 3, 0), make_report("b", 8, 0)])
    assert counts.only_reference == 8


def test_the_median_is_that_of_the_fall_and_not_of_the_changes() -> None:
    # Falls of 10, 1 and 5 tasks; tasks that changed: 10, 23 and 5.
    reports = [make_report("a", 10, 0), make_report("b", 12, 11), make_report("c", 5, 0)]
    [counts] = pool(reports)
    assert (counts.only_reference, counts.only_candidate) == (5, 0)
