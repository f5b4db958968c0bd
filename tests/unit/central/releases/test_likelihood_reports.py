"""What a report may say of the likelihood of texts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from central.errors import Refused
from central.gate import PairedLikelihood, pool
from central.journal import EvaluationRecord
from central.releases.reports import check_results, plain_result
from protos.manifest import canonical_json
from protos.releases.v1 import releases_pb2

OFFER = EvaluationRecord(
    offer_id="o",
    cohort="shared",
    candidate="d" * 64,
    reference="a" * 64,
    tasks=10,
    deadline_at="2026-11-22T12:00:00Z",
    nodes=("a-1",),
)
FOUND = {
    "documents": 4,
    "tokens": 40,
    "reference_mean": -3.0,
    "candidate_mean": -3.5,
    "difference_sum": -2.0,
    "difference_square_sum": 1.5,
}


def make_result(likelihood: dict[str, Any], **fields: Any) -> releases_pb2.EnvironmentResult:
    found = releases_pb2.PairedLikelihood(**{**FOUND, **likelihood})
    return releases_pb2.EnvironmentResult(
        environment="text", tasks_digest="0" * 64, likelihood=found, **fields
    )


@pytest.mark.parametrize(
    ("likelihood", "told"),
    [
        ({"documents": 0}, "has 0 documents with 40 tokens of 'text'. Expected at least one"),
        ({"documents": 11}, "counts 11 tasks of environment 'text'. Expected at most 10"),
        ({"documents": 2**32 - 1}, "Expected at most 10"),
        ({"tokens": 3}, "has 4 documents with 3 tokens"),
        ({"tokens": 2**63}, "1 to 16777216 tokens each"),
        ({"reference_mean": math.nan}, "has mean log-probabilities nan and -3.5"),
        ({"candidate_mean": -math.inf}, "Expected numbers from -10000 to 0 nats a token"),
        ({"candidate_mean": 0.1}, "Expected numbers from -10000 to 0 nats a token"),
        ({"difference_sum": 2.0}, "sums the differences of 4 documents of 'text' to 2.0"),
        ({"difference_sum": -2.001}, "Expected -2.0, from the means"),
        ({"difference_sum": math.nan}, "to nan"),
        ({"difference_sum": math.inf}, "to inf"),
        ({"difference_square_sum": 0.99}, "has 0.99 as the sum of 4 squared differences"),
        ({"difference_square_sum": -1.0}, "Expected 1.0 to 4e+08"),
        ({"difference_square_sum": math.nan}, "has nan as the sum"),
        ({"difference_square_sum": math.inf}, "has inf as the sum"),
    ],
)
def test_what_no_honest_node_measures_is_refused(likelihood: dict[str, Any], told: str) -> None:
    with pytest.raises(Refused) as caught:
        check_results([make_result(likelihood)], OFFER)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [{"both_passed": 1}, {"attempts": 2}, {"every_attempt": releases_pb2.PairedOutcomes()}],
    ids=str,
)
def test_texts_have_neither_passes_nor_attempts(fields: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="Expected one of the two"):
        check_results([make_result({}, **fields)], OFFER)


@pytest.mark.parametrize(
    "likelihood",
    [
        {},
        {"difference_square_sum": 1.0},
        {"difference_square_sum": 1.0 - 1e-12},
        {"reference_mean": 0.0, "candidate_mean": 0.0, "difference_sum": 0.0},
        {"reference_mean": 1e-6, "candidate_mean": 1e-6, "difference_sum": 0.0},
        {"candidate_mean": -3.0, "difference_sum": 0.0, "difference_square_sum": 0.0},
        {"difference_sum": -2.0 + 1e-9},
    ],
    ids=str,
)
def test_what_was_measured_is_taken_and_goes_into_the_journal(likelihood: dict[str, Any]) -> None:
    several = EvaluationRecord(**{**vars(OFFER), "attempts": 3, "temperature": 0.7})
    for offer in (OFFER, several):
        check_results([make_result(likelihood, attempts=1)], offer)
    plain = plain_result(make_result(likelihood))
    assert releases_pb2.EnvironmentResult(**plain) == make_result(likelihood)
    assert canonical_json(plain)
    (pooled,) = pool([("a-1", [plain])])
    assert isinstance(pooled, PairedLikelihood)
    assert pooled.total == 4


def test_a_later_look_may_find_no_more_documents() -> None:
    later = EvaluationRecord(**{**vars(OFFER), "look": 2, "attempts": 3, "temperature": 0.7})
    empty = releases_pb2.EnvironmentResult(environment="text", tasks_digest="0" * 64, attempts=1)
    check_results([empty], later)
    assert "likelihood" not in plain_result(empty)
