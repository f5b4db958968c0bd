"""The gate: a candidate need not be good, but no environment may be worse than at its best.

In: per environment the paired outcomes so far, the release they compare with, what was spent at
earlier looks. Out: per environment figures with a standing; from these a verdict with its reasons,
or which environments need more tasks. No I/O.

The rule for one environment with n pairs so far: b tasks were passed by the reference alone, c
tasks by the candidate alone. t is its tolerance and m the margin, both in points / 100. The
reference is the environment's high-water release.

    fell        (b - c) / n > t, and b is significantly more than half of b + c (exact McNemar test)
    fine        the loss is surely below t + m (Tango's score test of non-inferiority)
    undecided   neither: it is asked more tasks, until it has had `max_tasks` or no more can come

For an environment of texts with n documents, d = candidate less reference of a document's mean
log-probability, t and m in nats a token:

    fell        -mean(d) > t, and mean(d) is significantly below 0 (one-sided paired t-test)
    fine        mean(d) is surely above -(t + m) (t-test of non-inferiority)

One fallen environment rejects the candidate. The candidate is accepted when none fell and every
undecided one has had its last task. What stays undecided did not fall significantly, so it does not
reject. The verdict's text names it.

Errors. Each environment has alpha to spend over its looks, for each of the two tests. Let
f = n / max_tasks, and f = 1 at the last look. The part of alpha that is spent up to a look is

    f for "fell", f^2 for "fine"

This is a spending function alpha f^rho (Lan and DeMets 1983, "Discrete sequential boundaries for
clinical trials"; Kim and DeMets 1987, "Design and analysis of group sequential tests based on the
type I error spending rate function"). A look tests at the level that it adds. By the union bound
this needs no joint distribution of the looks.

- Fall: p / share goes through Holm's correction over the environments. So the chance that any
  environment without a loss is said to have fallen, at any look, is at most alpha. This holds
  whatever the looks were.
- Fine: the chance that an environment which lost t + m or more is said to be fine is at most alpha,
  for each environment.
- A wrong "fine" at a small look can hide a loss far beyond t + m. At a large look it hides only a
  loss a little beyond. So "fine" spends f^2, little at first.
- A fall is to be seen soon, so "fell" spends f.
- `better` (high_water.py) spends a small level of its own as f, because its errors hide losses too.

With k > 1 attempts an environment has two tests: the first answers (pass^1), and all k attempts
(pass^k; Yao et al. 2024, tau-bench, arXiv:2406.12045). Both go through the correction. Either can
fall; both must be fine. Where `max_tasks` is the first look's number of tasks, there is a single
look with all of alpha.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from central.gate.counts import Outcomes
from central.gate.high_water import is_better
from central.gate.likelihood import Differences, PairedLikelihood
from central.gate.paired_tests import holm
from central.gate.pooling import Paired

Figures = Mapping[str, Any]
"""What was found of one environment, as stored in the journal: JSON values only."""


class Standing(StrEnum):
    FELL = "fell"
    FINE = "fine"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Evidence:
    """What is known of one environment at one look."""

    counts: Paired
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
    """environments: figures by environment; high_water: the releases compared with."""

    accepted: bool
    text: str
    environments: dict[str, dict[str, Any]]
    high_water: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Gate:
    """alpha: level of all tests together; points are percent of tasks, nats are a token's."""

    alpha: float
    tolerance_points: float
    anchor_tolerance_points: float
    environments: Mapping[str, float] = field(default_factory=dict)
    """Tolerance by environment name, in nats for one of texts; wins over the others."""
    margin_points: float = 2.5
    max_tasks: int = 1
    """Tasks per environment, over all nodes, after which there is no further look."""
    likelihood_tolerance_nats: float = 0.05
    """Of environments of texts, anchors or not."""
    likelihood_margin_nats: float = 0.05

    def look(
        self, evidence: Sequence[Evidence], settled: Mapping[str, Figures] | None = None
    ) -> dict[str, Figures]:
        """Figures by environment, sorted by name. `settled` were found fine earlier, and stay."""
        kept = dict(settled or {})
        tests: dict[tuple[str, int], float] = {}
        for item in evidence:
            share = self._share(item)
            for number, measure in enumerate(_measures(item.counts)):
                p = measure.p_fall()
                tests[item.counts.environment, number] = p / share if share > 0 else 2.0
        # A settled environment still counts among the tests that Holm corrects for.
        for name, figures in kept.items():
            tests |= {
                (name, number): 2.0 for number in range(2 if "every_attempt" in figures else 1)
            }
        significant = holm(tests, self.alpha)
        found = {item.counts.environment: self._figures(item, significant) for item in evidence}
        return dict(sorted((kept | found).items()))

    def verdict(self, found: Mapping[str, Figures]) -> Verdict | None:
        """The verdict; None while none has fallen and an undecided one can be asked more tasks."""
        fell = [name for name, figures in found.items() if figures["standing"] == Standing.FELL]
        if not fell and open_environments(found):
            return None
        unsure = [
            name for name, figures in found.items() if figures["standing"] == Standing.UNDECIDED
        ]
        sentences = [
            f"rejected: {', '.join(fell)} fell" if fell else "accepted: no environment fell"
        ]
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
        counts, share = item.counts, self._share(item)
        unit, scale = counts.unit, counts.scale
        tolerance, margin = self._limits(counts)
        spent = item.spent + share
        fell, fine, figures = False, True, []
        for number, measure in enumerate(_measures(counts)):
            p_fine = measure.p_fine(margin)
            fell |= measure.fall > tolerance and (counts.environment, number) in significant
            fine &= p_fine <= self.alpha * (spent**2 - item.spent**2)
            fall = {f"fall_{unit}": round(scale * measure.fall, counts.digits)}
            figures.append({**fall, "p_reference": measure.p_fall(), "p_fine": p_fine})
        document = counts.to_json()
        if len(figures) > 1:
            document["every_attempt"] |= figures[1]
        return {
            **document,
            **figures[0],
            "reference": item.reference,
            "reference_label": item.label,
            "fallback_reason": item.fallback_reason,
            f"tolerance_{unit}": round(scale * tolerance, counts.digits),
            f"margin_{unit}": round(scale * margin, counts.digits),
            "standing": str(
                Standing.FELL if fell else Standing.FINE if fine else Standing.UNDECIDED
            ),
            "better": is_better(counts, share),
            "spent": spent,
            "last": self._is_last(item),
        }

    def _share(self, item: Evidence) -> float:
        until_now = 1.0 if self._is_last(item) else item.counts.total / self.max_tasks
        return max(until_now - item.spent, 0.0)

    def _is_last(self, item: Evidence) -> bool:
        return item.last or item.counts.total >= self.max_tasks

    def _limits(self, counts: Paired) -> tuple[float, float]:
        """Tolerance, and the loss that "fine" excludes: fractions of tasks, or nats."""
        if isinstance(counts, PairedLikelihood):
            tolerance = self.environments.get(counts.environment, self.likelihood_tolerance_nats)
            return tolerance, tolerance + self.likelihood_margin_nats
        default = self.anchor_tolerance_points if counts.anchor else self.tolerance_points
        tolerance = self.environments.get(counts.environment, default) / 100
        return tolerance, min(tolerance + self.margin_points / 100, 0.99)


def open_environments(found: Mapping[str, Figures]) -> list[str]:
    """Environments that need more tasks and can be asked them."""
    return [
        name
        for name, item in found.items()
        if item["standing"] == Standing.UNDECIDED and not item["last"]
    ]


def _measures(counts: Paired) -> Sequence[Outcomes | Differences]:
    return counts.measures


def _line(name: str, figures: Figures) -> str:
    unit = "points"
    if "likelihood" in figures:
        unit, text = "nats", _likelihood(figures)
    else:
        text = _counts(figures, figures["total"])
    if "every_attempt" in figures:
        every = _counts(figures["every_attempt"], figures["total"])
        text += f", all {figures['attempts']} attempts {every}"
    text = f"{'anchor ' if figures['anchor'] else ''}{name}: {text}"
    text += (
        f" (against {figures['reference_label'] or figures['reference'][:8]}, tolerance "
        f"{figures[f'tolerance_{unit}']:g} {unit}, "
        f"{figures['nodes']} node{'s' if figures['nodes'] > 1 else ''}), {figures['standing']}"
    )
    if figures["fallback_reason"]:
        reason = figures["fallback_reason"].rstrip(".")
        text += f"; not against its high-water release, because {reason}"
    return text


def _counts(outcomes: Figures, total: int) -> str:
    both, b, c = outcomes["both"], outcomes["only_reference"], outcomes["only_candidate"]
    return (
        f"{both + b} -> {both + c} of {total} (only reference {b}, only candidate {c}, p "
        f"{outcomes['p_reference']:.2g})"
    )


def _likelihood(figures: Figures) -> str:
    found = figures["likelihood"]
    return (
        f"{found['reference_mean']:.3f} -> {found['candidate_mean']:.3f} nats a token over "
        f"{found['documents']} document{'s' if found['documents'] > 1 else ''} (p "
        f"{figures['p_reference']:.2g})"
    )
