"""What the local gate makes of its counts (`gate.py` asks for them).

In: paired results of a policy and its start on one environment each. Out: which environments fell,
and the counts for the manifest. Pure; imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from edge_node.round_settings import GateSettings
from protos.releases.v1 import releases_pb2

ALPHA = 0.05
"""Chance that a round which changes nothing is stopped, over all its comparisons."""


@dataclass(frozen=True)
class Compared:
    """One comparison on one environment.

    start, policy: the share of the tasks that passed; of texts the mean log-probability, in nats a
    token. every: all answers to a task had to pass. p_fall: the chance of such a fall where there
    is none.
    """

    environment: str
    anchor: bool
    tasks: int
    better: int
    worse: int
    start: float
    policy: float
    p_fall: float
    every: bool = False
    is_text: bool = False

    def fell(self, settings: GateSettings, comparisons: int) -> bool:
        """Whether it fell further than is tolerated, and not by chance (Bonferroni)."""
        tolerated = settings.tolerance_nats if self.is_text else settings.tolerance_points / 100
        return self.start - self.policy > tolerated and self.p_fall <= ALPHA / comparisons

    def __str__(self) -> str:
        of = f"{'anchor' if self.anchor else 'environment'} {self.environment}"
        if self.is_text:
            return (
                f"{of}: {self.tasks} texts had {self.start:.3f} nats a token and now have "
                f"{self.policy:.3f}"
            )
        what = "passed by every answer" if self.every else "passed"
        return (
            f"{of}: of {self.tasks} held-out tasks {self.start * self.tasks:.0f} were {what} and "
            f"now {self.policy * self.tasks:.0f} are ({self.better} better, {self.worse} worse)"
        )


@dataclass(frozen=True)
class Verdict:
    """unjudged: environments that could not be asked."""

    compared: Sequence[Compared]
    unjudged: int

    def falls(self, settings: GateSettings) -> list[Compared]:
        return [one for one in self.compared if one.fell(settings, len(self.compared))]

    def metrics(self) -> dict[str, float]:
        """Sums over the own environments (held_out), the anchors, and the texts: none where there
        is no such comparison.
        """
        found = {"gate_unjudged": float(self.unjudged)}
        tasks = [one for one in self.compared if not one.is_text]
        for name, anchor in (("held_out", False), ("anchor", True)):
            for suffix, every in (("", False), ("_every", True)):
                chosen = [one for one in tasks if (one.anchor, one.every) == (anchor, every)]
                found |= _sums(name + suffix, chosen)
        return found | _sums("texts", [one for one in self.compared if one.is_text])


def _sums(name: str, compared: Sequence[Compared]) -> dict[str, float]:
    tasks = sum(one.tasks for one in compared)
    if not tasks:
        return {}
    return {
        f"{name}_tasks": float(tasks),
        f"{name}_better": float(sum(one.better for one in compared)),
        f"{name}_worse": float(sum(one.worse for one in compared)),
        f"{name}_start": sum(one.start * one.tasks for one in compared) / tasks,
        f"{name}_policy": sum(one.policy * one.tasks for one in compared) / tasks,
    }


def read_result(result: releases_pb2.EnvironmentResult, *, every: bool = False) -> Compared:
    """The first answers of `result`, or with `every` all attempts; of texts what they say."""
    if result.HasField("likelihood"):
        return _of_texts(result)
    counts = result.every_attempt if every else result
    both, worse, better = (
        counts.both_passed,
        counts.only_reference_passed,
        counts.only_candidate_passed,
    )
    tasks = both + worse + better + counts.neither_passed
    return Compared(
        environment=result.environment,
        anchor=result.anchor,
        tasks=tasks,
        better=better,
        worse=worse,
        start=(both + worse) / max(1, tasks),
        policy=(both + better) / max(1, tasks),
        p_fall=p_fall(worse, better),
        every=every,
    )


def _of_texts(result: releases_pb2.EnvironmentResult) -> Compared:
    """Which texts became better or worse is not known. The mean of many is normally distributed."""
    texts = result.likelihood
    count, mean = texts.documents, texts.difference_sum / texts.documents
    variance = max(texts.difference_square_sum / count - mean * mean, 0.0)
    error = math.sqrt(variance / max(1, count - 1))
    return Compared(
        environment=result.environment,
        anchor=result.anchor,
        tasks=count,
        better=0,
        worse=0,
        start=texts.reference_mean,
        policy=texts.candidate_mean,
        p_fall=NormalDist().cdf(mean / error) if error else float(mean >= 0),
        is_text=True,
    )


def p_fall(worse: int, better: int) -> float:
    """The exact one-sided test of McNemar 1947: P(X >= worse), X ~ Binomial(worse + better, 1/2).

    1 where nothing changed.
    """
    changed = worse + better
    as_many = sum(math.comb(changed, count) for count in range(worse, changed + 1))
    return float(as_many / 2**changed)
