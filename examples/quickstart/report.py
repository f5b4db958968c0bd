"""The report of one demo run, and whether it shows what it must.

In: the story's records, the last snapshot of central, and times. Out: demo-report.json, a list of
bars with what was seen, and a summary for people. The keys at the top level are fixed; everything
else is under `detail`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.quickstart.operator_view import Snapshot
from examples.quickstart.story import NodeRecord, Story
from examples.quickstart.world import Bar, Report, World


def build_report(
    story: Story, seconds: Mapping[str, float], sent: int, restarts: Mapping[str, int]
) -> Report:
    """The whole report.

    `sent`: updates that left the nodes. `restarts`: how often each process was started again.
    """
    snapshot = story.snapshot
    if snapshot is None:
        raise RuntimeError(
            "Central was never seen, so there is nothing to report. See demo-run/logs/central.log."
        )
    world, records = story.world, story.records.values()
    counts = snapshot.update_counts()
    kept = ("admitted", "merged", "waiting", "superseded", "set_aside", "quarantined", "forgotten")
    report: Report = {
        "success": {"before": _rates(records, "before"), "after": _rates(records, "after")},
        "anchor": {
            "before": {r.plan.key: _anchors(r)[0] for r in records},
            "after": {r.plan.key: _anchors(r)[-1] for r in records},
            "lowest": {r.plan.key: min(_anchors(r)) for r in records},
        },
        "releases": len(snapshot.accepted()),
        "updates": {"sent": sent} | {state: counts[state] for state in kept},
        "requests": {
            "total": sum(r.requests for r in records),
            "failed": sum(r.failed for r in records),
        },
        "answers_without_exact_version": sum(r.inexact for r in records),
        "cross_cohort_updates_merged": snapshot.cross_cohort_merges(),
        "seed": story.seed,
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
        "detail": {
            "outcome": story.outcome,
            "size": story.size.name,
            "measured_tasks": story.size.measured_tasks,
            "seed_chooses": world.seed_chooses,
            "settings": {
                "central": dict(world.central),
                "edge": {
                    cohort: world.edge(story.size, cohort)
                    for cohort in sorted({plan.cohort for plan in world.nodes.values()})
                },
            },
            "text_logprob": story.text_logprob,
            "updates_planned": counts["planned"],
            "process_restarts": dict(restarts),
            "nodes": {r.plan.key: _node_detail(r) for r in records},
            "releases": [
                _release_detail(r)
                for r in sorted(snapshot.releases, key=lambda r: (r.created_at, r.version))
            ],
            "updates": [asdict(update) for update in snapshot.updates],
        },
    }
    if story.text_logprob:
        report["text_logprob"] = _text_logprob(story.text_logprob)
    report["detail"] |= {"title": world.title, "lowest_anchor": world.lowest_anchor(report)}
    return report


def check_bars(report: Report, world: World) -> list[Bar]:
    """What a full run must show; the demo exits non-zero unless every bar holds."""
    updates, requests = report["updates"], report["requests"]
    counted = ("merged", "waiting", "superseded", "set_aside", "quarantined", "forgotten")
    accounted = sum(updates[state] for state in counted)
    return [
        *world.bars(report),
        Bar(
            "every admitted update is accounted for",
            f"{updates['admitted']} = "
            + " + ".join(f"{updates[s]} {s.replace('_', ' ')}" for s in counted),
            updates["admitted"] == accounted and updates["admitted"] > 0,
        ),
        Bar(
            "no failed request",
            f"{requests['failed']} of {requests['total']}",
            requests["failed"] == 0,
        ),
        Bar(
            "every answer named its exact version", *_zero(report["answers_without_exact_version"])
        ),
        Bar("no update crossed a cohort", *_zero(report["cross_cohort_updates_merged"])),
    ]


def write_report(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report, indent=2) + "\n")


def print_summary(report: Report, bars: Sequence[Bar], console: Console) -> None:
    """Tables of success, of the bars, and of where the time went."""
    table = Table(title="Verified success on held-out tasks, in percent", title_justify="left")
    for column in ("node", "own work before", "after", "base skill before", "lowest", "after"):
        table.add_column(column, justify="left" if column == "node" else "right")
    for key, value in report["success"]["before"].items():
        row = [value, report["success"]["after"][key]]
        row += [report["anchor"][when][key] for when in ("before", "lowest", "after")]
        table.add_row(key, *(f"{number:.0f}" for number in row))
    console.print(table)
    updates = report["updates"]
    console.print(
        f"{report['releases']} releases; {updates['sent']} updates sent, "
        f"{updates['admitted']} admitted, {updates['merged']} merged; "
        f"{report['requests']['total']} requests, {report['requests']['failed']} failed."
    )
    console.print(
        "Time: "
        + ", ".join(
            f"{key.replace('_', ' ')} {value:.0f} s" for key, value in report["seconds"].items()
        )
    )
    if bars:
        verdict = Table(title="What this run must show", title_justify="left")
        verdict.add_column("")
        verdict.add_column("bar")
        verdict.add_column("seen")
        for bar in bars:
            verdict.add_row("[green]PASS[/]" if bar.holds else "[red]FAIL[/]", bar.text, bar.seen)
        console.print(verdict)


def _rates(records: Any, kind: str) -> dict[str, float]:
    rates = {}
    for record in records:
        point = record.last(kind)
        rates[record.plan.key] = round(point.percent, 1) if point else 0.0
    return rates


def _anchors(record: NodeRecord) -> list[float]:
    """Anchor success of every release the node served, in the order of measuring.

    The first is the base itself.
    """
    return [round(point.percent, 1) for point in record.points if point.kind == "anchor"] or [0.0]


def _text_logprob(by_release: Mapping[str, float]) -> dict[str, float]:
    """Nats a token: under the base, under the last release, and the lowest of any."""
    means = [round(mean, 4) for mean in by_release.values()]
    return {"before": means[0], "after": means[-1], "lowest": min(means)}


def _node_detail(record: NodeRecord) -> dict[str, Any]:
    return {
        "cohort": record.plan.cohort,
        "environment": record.plan.environment,
        "learns": record.plan.learns,
        "ready_at_s": round(record.ready_at_s or 0.0, 1),
        "served": [{"at_s": round(at_s, 1), "release": label} for at_s, label in record.served],
        "points": [asdict(point) | {"at_s": round(point.at_s, 1)} for point in record.points],
        "errors": record.errors[:20],
    }


def _release_detail(release: Any) -> dict[str, Any]:
    fields = (
        "label",
        "cohort",
        "state",
        "channels",
        "created_at",
        "updates",
        "truncation_error",
        "verdict",
    )
    return {name: getattr(release, name) for name in fields}


def _zero(count: int) -> tuple[str, bool]:
    return str(count), count == 0


def last_snapshot_line(snapshot: Snapshot | None) -> str:
    """One line on central for logs and plain output."""
    if snapshot is None:
        return "central: not seen yet"
    counts = snapshot.update_counts()
    heads = [
        f"{cohort} {head.label}"
        for cohort in sorted({r.cohort for r in snapshot.releases})
        if (head := snapshot.head(cohort))
    ]
    return f"central: {', '.join(heads)}; updates " + ", ".join(
        f"{state} {n}" for state, n in counts.items() if n
    )
