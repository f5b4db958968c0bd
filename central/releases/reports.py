"""Evaluation reports of nodes: what no honest evaluation can say is refused.

In: results as they came, the offer that they answer. Out: dictionaries for the journal. Errors:
Refused, which names what was wrong and what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import grpc

from central.errors import Reason, Refused
from central.journal import EvaluationRecord
from protos.releases.v1 import releases_pb2

MAX_ENVIRONMENTS = 256
MAX_NAME = 128
MAX_REASON = 500
"""Characters that are kept of a reason in a node's words."""
DIGEST = re.compile(r"[0-9a-f]{64}")
Result = releases_pb2.EnvironmentResult
Outcomes = releases_pb2.EnvironmentResult | releases_pb2.PairedOutcomes
COUNTS = ("both_passed", "only_reference_passed", "only_candidate_passed", "neither_passed")
MAX_NATS = 10_000.0
"""No log-probability of a token is below minus this."""
ROUNDING_NATS = 1e-5
"""Float32 may put the log-probability of a sure token so far above 0."""
MAX_TOKENS = 1 << 24
"""Of one document."""
ROUNDING = 1e-9
"""Part of a sum that its rounding may be."""


def check_report(request: releases_pb2.ReportEvaluationRequest) -> None:
    """A report has results or a reason; raises Refused."""
    if bool(request.results) == bool(request.abstain_reason):
        raise _bad_report(
            f"has {len(request.results)} results and abstain reason "
            f"{request.abstain_reason[:80]!r}. Expected either results or a reason."
        )


def check_results(results: Sequence[Result], offer: EvaluationRecord) -> None:
    """Refuse results that no honest answer to `offer` can have.

    A later look may find no more tasks, the first one may not.
    """
    if len(results) > MAX_ENVIRONMENTS:
        raise _bad_report(f"has {len(results)} environments. Expected at most {MAX_ENVIRONMENTS}.")
    seen: set[str] = set()
    for result in results:
        name = result.environment
        if not 0 < len(name) <= MAX_NAME or name in seen:
            raise _bad_report(
                f"names environment {name[:80]!r} twice or not at all. Expected one result each, "
                f"named with 1 to {MAX_NAME} characters."
            )
        seen.add(name)
        if not DIGEST.fullmatch(result.tasks_digest):
            raise _bad_report(
                f"has tasks digest {result.tasks_digest[:80]!r} for {name!r}. Expected 64 hex "
                "digits."
            )
        _check_tasks(result, offer)
        if result.HasField("likelihood"):
            _check_likelihood(result)
        elif _total(result):
            _check_attempts(result, offer.attempts)
        if result.reference_id not in ("", offer.compared_with(name), offer.reference):
            raise _bad_report(
                f"compares {name!r} with release {result.reference_id[:80]!r}. Expected "
                f"{offer.compared_with(name)!r}, or the offer's reference {offer.reference!r} and "
                "the reason."
            )
    if results and offer.look == 1 and not any(_total(result) for result in results):
        raise _bad_report(
            "has results without any task. Expected at least one task, or an abstention with its "
            "reason."
        )


def plain_result(result: Result) -> dict[str, Any]:
    """The result as the journal has it, without fields at their defaults."""
    plain: dict[str, Any] = {
        "environment": result.environment,
        "tasks_digest": result.tasks_digest,
        "anchor": result.anchor,
        **_counts(result),
    }
    if result.reference_id:
        plain["reference_id"] = result.reference_id
    if result.fallback_reason:
        plain["fallback_reason"] = result.fallback_reason[:MAX_REASON]
    if result.first_task:
        plain["first_task"] = result.first_task
    if result.HasField("every_attempt"):
        plain |= {"attempts": result.attempts, "every_attempt": _counts(result.every_attempt)}
    if result.HasField("likelihood"):
        likelihood = result.likelihood
        plain["likelihood"] = {
            field.name: getattr(likelihood, field.name) for field in likelihood.DESCRIPTOR.fields
        }
    return plain


def _check_tasks(result: Result, offer: EvaluationRecord) -> None:
    name, total, suite = result.environment, _total(result), offer.suite(result.environment)
    if suite is None:
        raise _bad_report(
            f"has environment {name!r}. Expected only those asked for: "
            f"{', '.join(sorted(offer.suites))}."
        )
    if total > suite.tasks:
        raise _bad_report(
            f"counts {total} tasks of environment {name!r}. Expected at most {suite.tasks}."
        )
    if result.first_task != suite.first_task:
        raise _bad_report(
            f"leaves out the first {result.first_task} tasks of environment {name!r}. Expected "
            f"{suite.first_task}; a node that cannot do so needs newer software."
        )


def _check_attempts(result: Result, attempts: int) -> None:
    name, every = result.environment, result.every_attempt
    if max(1, result.attempts) != attempts or result.HasField("every_attempt") != (attempts > 1):
        raise _bad_report(
            f"has {max(1, result.attempts)} attempts at each task of {name!r}. Expected "
            f"{attempts}, and with two or more the outcomes of every attempt."
        )
    if attempts > 1 and (
        _total(every) != _total(result)
        or every.both_passed + every.only_reference_passed
        > result.both_passed + result.only_reference_passed
        or every.both_passed + every.only_candidate_passed
        > result.both_passed + result.only_candidate_passed
    ):
        raise _bad_report(
            f"counts {_total(every)} tasks of {name!r} for every attempt, or more passes than for "
            f"the first. Expected the same {_total(result)} tasks, and no task that passes every "
            "attempt but not the first."
        )


def _check_likelihood(result: Result) -> None:
    name, found = result.environment, result.likelihood
    if sum(_counts(result).values()) or result.HasField("every_attempt") or result.attempts > 1:
        raise _bad_report(
            f"has passes or attempts beside the likelihood of {name!r}. Expected one of the two: "
            "an environment has tasks or texts."
        )
    n, tokens = found.documents, found.tokens
    if not 0 < n <= tokens <= n * MAX_TOKENS:
        raise _bad_report(
            f"has {n} documents with {tokens} tokens of {name!r}. Expected at least one document, "
            f"and 1 to {MAX_TOKENS} tokens each."
        )
    means = (found.reference_mean, found.candidate_mean)
    # Also false for what is not a number, here and below.
    if not all(-MAX_NATS <= mean <= ROUNDING_NATS for mean in means):
        raise _bad_report(
            f"has mean log-probabilities {means[0]!r} and {means[1]!r} of {name!r}. Expected "
            f"numbers from {-MAX_NATS:g} to 0 nats a token."
        )
    total, squares = found.difference_sum, found.difference_square_sum
    if not abs(total - n * (means[1] - means[0])) <= ROUNDING * n * max(1.0, -means[0], -means[1]):
        raise _bad_report(
            f"sums the differences of {n} documents of {name!r} to {total!r}. Expected "
            f"{n * (means[1] - means[0])!r}, from the means."
        )
    least = total * total / n
    if not least * (1 - ROUNDING) <= squares <= n * MAX_NATS**2:
        raise _bad_report(
            f"has {squares!r} as the sum of {n} squared differences of {name!r}. Expected "
            f"{least!r} to {n * MAX_NATS**2:g}."
        )


def _counts(outcomes: Outcomes) -> dict[str, int]:
    return {name: getattr(outcomes, name) for name in COUNTS}


def _total(outcomes: Outcomes) -> int:
    """Tasks, or documents of an environment of texts."""
    documents = outcomes.likelihood.documents if isinstance(outcomes, Result) else 0
    return documents + sum(_counts(outcomes).values())


def _bad_report(problem: str) -> Refused:
    return Refused(
        grpc.StatusCode.INVALID_ARGUMENT, Reason.BAD_ARGUMENT, f"The evaluation report {problem}"
    )
