"""The gate: is any environment worse than it was at its best? A candidate need not be good, only not worse.

In: per environment the paired counts so far, the release they compare with, what was spent at earlier looks. Out: per environment
figures with a standing; from these a verdict with its reasons, or which environments need more tasks. No I/O.

The rule, for an environment with n pairs so far: b = tasks that only the reference passed, c = tasks that only the candidate
passed, t = its tolerance and m = the margin, both in points / 100. The reference is the environment's high-water release.

    fell        (b - c) / n > t, and b is significantly more than half of b + c (exact McNemar test)
    fine        the loss is surely below t + m (Tango's score test of non-inferiority)
    undecided   neither: it is asked more tasks, until there are `max_tasks` or no more

One fallen environment rejects the candidate. Otherwise it is accepted when no environment is undecided and can still be asked. What
stays undecided after its last task did not fall significantly, so it does not reject either; the verdict's text names it.

Errors. Each environment has alpha to spend over its looks, for either test. With f = n / max_tasks, and 1 at the last look, what was
spent of it up to a look is
    f for "fell", f^2 for "fine"
(Lan and DeMets 1983, "Discrete sequential boundaries for clinical trials"; Kim and DeMets 1987, "Design and analysis of group
sequential tests based on the type I error spending rate function": alpha f^rho). A look tests with what it adds, as it is: by the union
bound that needs no joint distribution. For a fall p / share then goes through Holm's correction over the environments. So the chance that
any environment without a loss is said to have fallen, at any look, is at most alpha, whatever the looks were; and the chance that one
which lost t + m or more is said to be fine is at most alpha each. f^2 because an error of "fine" at a small look can hide a loss far
beyond t + m, at a large one only a loss a little beyond it; a fall is to be seen soon. `better` (high_water.py), whose errors
hide losses likewise, spends its own small level as f: at a look with little of it.
With k > 1 attempts the first answers (pass^1) and all k (pass^k; Yao et al. 2024, tau-bench, arXiv:2406.12045) are two tests of
an environment: both go through the correction, either can fall, both must be fine.
`max_tasks` = the first look's tasks is a single look with all of alpha.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from central.evaluation.counts import Outcomes, PairedCounts
from central.evaluation.high_water import is_better
from central.evaluation.paired_tests import holm, mcnemar, non_inferiority

Figures = Mapping[str, Any]
"""What was found of one environment, as stored in the journal: JSON values only."""


class Standing(StrEnum):
    FELL = "fell"
    FINE = "fine"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Evidence:
    """What is known of one environment at one look."""

    counts: PairedCounts
    reference: str
    """Id of the release that the candidate was compared with."""
    label: str = ""
    """Its label, for the text."""
    spent: float = 0.0
    """Share of max_tasks, and so of alpha for a fall, that earlier looks spent."""
    last: bool = True
    """No more tasks can come."""
    fallback_reason: str = ""
    """Why the reference is not the high-water release; empty otherwise."""


@dataclass(frozen=True)
class Verdict:
    """environments: figures by environment; high_water: the releases that the decision compared with."""

    accepted: bool
    text: str
    environments: dict[str, dict[str, Any]]
    high_water: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Gate:
    """alpha: level of the family of tests; tolerances and margin are in points (percent of tasks)."""

    alpha: float
    tolerance_points: float
    anchor_tolerance_points: float
    environments: Mapping[str, float] = field(default_factory=dict)
    """Tolerance by environment name; wins over both above."""
    margin_points: float = 2.5
    max_tasks: int = 1
    """Tasks per environment, over all nodes, after which there is no further look."""

    def look(self, evidence: Sequence[Evidence], settled: Mapping[str, Figures] | None = None) -> dict[str, Figures]:
        """Figures by environment, sorted; `settled` are environments that an earlier look found fine, kept as they are."""
        kept = dict(settled or {})
        tests: dict[tuple[str, int], float] = {}
        for item in evidence:
            share = self._share(item)
            for measure, outcomes in enumerate(_measures(item.counts)):
                p = mcnemar(outcomes.only_reference, outcomes.only_candidate)
                tests[item.counts.environment, measure] = p / share if share > 0 else 2.0
        # An environment that is settled is still one of those that the error is spread over.
        for name, figures in kept.items():
            tests |= {(name, measure): 2.0 for measure in range(2 if "every_attempt" in figures else 1)}
        significant = holm(tests, self.alpha)
        found = {item.counts.environment: self._figures(item, significant) for item in evidence}
        return dict(sorted((kept | found).items()))

    def verdict(self, found: Mapping[str, Figures]) -> Verdict | None:
        """The verdict on one candidate; None while an undecided environment can be asked more tasks and none has fallen."""
        fell = [name for name, figures in found.items() if figures["standing"] == Standing.FELL]
        if not fell and open_environments(found):
            return None
        unsure = [name for name, figures in found.items() if figures["standing"] == Standing.UNDECIDED]
        sentences = [f"rejected: {', '.join(fell)} fell" if fell else "accepted: no environment fell"]
        if unsure and not fell:
            sentences.append(f"Too few tasks to be sure of {', '.join(unsure)}")
        sentences += [_line(name, figures) for name, figures in found.items()]
        return Verdict(
            accepted=not fell,
            text=". ".join(sentences) + ".",
            environments={name: dict(figures) for name, figures in found.items()},
            high_water={name: {"release": figures["reference"]} for name, figures in found.items()},
        )

    def _figures(self, item: Evidence, significant: set[tuple[str, int]]) -> Figures:
        counts, tolerance = item.counts, self._tolerance(item.counts)
        share, margin = self._share(item), min(tolerance + self.margin_points / 100, 0.99)
        spent = item.spent + share
        fell, fine, figures = False, True, []
        for measure, outcomes in enumerate(_measures(counts)):
            p_fine = non_inferiority(outcomes.only_reference, outcomes.only_candidate, outcomes.total, margin)
            fell |= outcomes.fall > tolerance and (counts.environment, measure) in significant
            fine &= p_fine <= self.alpha * (spent**2 - item.spent**2)
            p = mcnemar(outcomes.only_reference, outcomes.only_candidate)
            figures.append({"fall_points": round(100 * outcomes.fall, 3), "p_reference": p, "p_fine": p_fine})
        document = counts.to_json()
        if counts.every_attempt is not None:
            document["every_attempt"] |= figures[1]
        return {
            **document,
            **figures[0],
            "reference": item.reference,
            "reference_label": item.label,
            "fallback_reason": item.fallback_reason,
            "tolerance_points": round(100 * tolerance, 3),
            "margin_points": round(100 * margin, 3),
            "standing": str(Standing.FELL if fell else Standing.FINE if fine else Standing.UNDECIDED),
            "better": is_better(counts.first, counts.every_attempt, share),
            "spent": spent,
            "last": self._is_last(item),
        }

    def _share(self, item: Evidence) -> float:
        until_now = 1.0 if self._is_last(item) else item.counts.total / self.max_tasks
        return max(until_now - item.spent, 0.0)

    def _is_last(self, item: Evidence) -> bool:
        return item.last or item.counts.total >= self.max_tasks

    def _tolerance(self, counts: PairedCounts) -> float:
        default = self.anchor_tolerance_points if counts.anchor else self.tolerance_points
        return self.environments.get(counts.environment, default) / 100


def open_environments(found: Mapping[str, Figures]) -> list[str]:
    """Environments that need more tasks and can be asked them."""
    return [name for name, item in found.items() if item["standing"] == Standing.UNDECIDED and not item["last"]]


def _measures(counts: PairedCounts) -> Iterator[Outcomes]:
    yield counts.first
    if counts.every_attempt is not None:
        yield counts.every_attempt


def _line(name: str, figures: Figures) -> str:
    text = f"{'anchor ' if figures['anchor'] else ''}{name}: {_counts(figures, figures['total'])}"
    if "every_attempt" in figures:
        text += f", all {figures['attempts']} attempts {_counts(figures['every_attempt'], figures['total'])}"
    text += (
        f" (against {figures['reference_label'] or figures['reference'][:8]}, tolerance {figures['tolerance_points']:g} points, "
        f"{figures['nodes']} node{'s' if figures['nodes'] > 1 else ''}), {figures['standing']}"
    )
    if figures["fallback_reason"]:
        text += f"; not against its high-water release, because {figures['fallback_reason'].rstrip('.')}"
    return text


def _counts(outcomes: Figures, total: int) -> str:
    both, b, c = outcomes["both"], outcomes["only_reference"], outcomes["only_candidate"]
    return (
        f"{both + b} -> {both + c} of {total} (only reference {b}, only candidate {c}, p {outcomes['p_reference']:.2g})"
    )
