"""What a report may say of an offer; all else is refused with what was expected."""

from __future__ import annotations

from typing import Any

import pytest

from central.errors import Refused
from central.gate import pool
from central.journal import EvaluationRecord, Suite
from central.releases.reports import check_results, plain_result
from protos.releases.v1 import releases_pb2

PARENT, BEST, OTHER = "a" * 64, "b" * 64, "c" * 64


def make_offer(**fields: Any) -> EvaluationRecord:
    values = {
        "offer_id": "o",
        "cohort": "shared",
        "candidate": "d" * 64,
        "reference": PARENT,
        "tasks": 10,
        "deadline_at": "2026-11-22T12:00:00Z",
        "nodes": ("a-1",),
        "references": {"e": BEST},
    }
    return EvaluationRecord(**{**values, **fields})


def make_result(**fields: Any) -> releases_pb2.EnvironmentResult:
    values = {"environment": "e", "tasks_digest": "0" * 64, "both_passed": 8, "neither_passed": 2}
    return releases_pb2.EnvironmentResult(**{**values, **fields})


def every(*counts: int) -> releases_pb2.PairedOutcomes:
    names = ("both_passed", "only_reference_passed", "only_candidate_passed", "neither_passed")
    return releases_pb2.PairedOutcomes(**dict(zip(names, counts, strict=True)))


LATER = make_offer(look=2, suites={"e": Suite(first_task=20, tasks=5)})
SEVERAL = make_offer(attempts=3, temperature=0.7)


@pytest.mark.parametrize(
    ("offer", "fields", "told"),
    [
        (
            make_offer(),
            {"reference_id": OTHER},
            f"compares 'e' with release '{OTHER}'. Expected '{BEST}'",
        ),
        (
            make_offer(),
            {"first_task": 10},
            "leaves out the first 10 tasks of environment 'e'. Expected 0",
        ),
        (
            LATER,
            {"both_passed": 3, "neither_passed": 0},
            "leaves out the first 0 tasks of environment 'e'. Expected 20",
        ),
        (LATER, {"first_task": 20}, "counts 10 tasks of environment 'e'. Expected at most 5"),
        (
            LATER,
            {"environment": "f", "first_task": 20},
            "has environment 'f'. Expected only those asked for: e.",
        ),
        (
            make_offer(),
            {"attempts": 3, "every_attempt": every(5, 0, 0, 5)},
            "has 3 attempts at each task of 'e'. Expected 1",
        ),
        (SEVERAL, {}, "has 1 attempts at each task of 'e'. Expected 3"),
        (SEVERAL, {"attempts": 3}, "and with two or more the outcomes of every attempt"),
        (
            SEVERAL,
            {"attempts": 3, "every_attempt": every(5, 0, 0, 4)},
            "counts 9 tasks of 'e' for every attempt",
        ),
        (
            SEVERAL,
            {"attempts": 3, "every_attempt": every(5, 0, 4, 1)},
            "no task that passes every attempt but not the first",
        ),
        (
            SEVERAL,
            {"attempts": 3, "every_attempt": every(5, 4, 0, 1)},
            "no task that passes every attempt but not the first",
        ),
        (make_offer(), {"both_passed": 0, "neither_passed": 0}, "without any task"),
    ],
)
def test_what_was_not_asked_is_refused(
    offer: EvaluationRecord, fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(Refused) as caught:
        check_results([make_result(**fields)], offer)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("offer", "fields"),
    [
        (make_offer(), {}),
        (make_offer(), {"reference_id": BEST}),
        (make_offer(), {"reference_id": PARENT, "fallback_reason": "rank 9"}),
        (LATER, {"first_task": 20, "both_passed": 3}),
        (LATER, {"first_task": 20, "both_passed": 0, "neither_passed": 0}),
        (SEVERAL, {"attempts": 3, "every_attempt": every(4, 1, 2, 3)}),
    ],
)
def test_what_was_asked_is_taken_and_becomes_plain_fields(
    offer: EvaluationRecord, fields: dict[str, Any]
) -> None:
    result = make_result(**fields)
    check_results([result], offer)
    plain = plain_result(result)
    assert releases_pb2.EnvironmentResult(**plain) == result
    assert [counts.total for counts in pool([("a-1", [plain])])] in (
        [result.both_passed + result.neither_passed],
        [],
    )


def test_a_nodes_words_are_kept_short() -> None:
    assert len(plain_result(make_result(fallback_reason="x" * 10_000))["fallback_reason"]) == 500
