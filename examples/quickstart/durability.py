"""Whether anything was lost or doubled, read from the stores of a stopped system.

In: the directory of a run, and what clients had acknowledged. Out: one finding for each promise,
with the figures.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from central.journal import Journal
from central.journal.events import Event, EventKind
from edge_node.outbox import Outbox
from examples.quickstart.steady_client import Acknowledged


@dataclass(frozen=True)
class Finding:
    promise: str
    seen: str
    holds: bool


def check_run(root: Path, clients: Mapping[str, Acknowledged]) -> list[Finding]:
    """Every promise. `clients`: what was acknowledged, by node name."""
    journal = Journal(f"sqlite:///{root / 'central' / 'journal.db'}")
    try:
        verified = journal.verify()
        events = _all_events(journal)
        with journal.read() as state:
            states = Counter(update.state for update in state.updates.values())
            admitted_in_state = len(state.updates)
    finally:
        journal.close()
    admitted = Counter(event.subject for event in events if event.kind == EventKind.UPDATE_ADMITTED)
    return [
        Finding(
            "the journal's hash chain is whole",
            f"{verified} events verified",
            verified == len(events),
        ),
        *_outbox_findings(root, clients, admitted),
        _merged_once(events),
        Finding(
            "every admitted update is accounted for",
            f"{len(admitted)} admitted = "
            + " + ".join(f"{count} {name}" for name, count in sorted(states.items())),
            len(admitted) == admitted_in_state == states.total(),
        ),
        *(_experience_finding(root, name, acknowledged) for name, acknowledged in clients.items()),
    ]


def _outbox_findings(
    root: Path, names: Mapping[str, object], admitted: Counter[str]
) -> list[Finding]:
    entries = [
        (name, entry)
        for name in names
        for entry in Outbox(root / "nodes" / name / "outbox", "auto").list()
    ]
    receipts = [entry.update_id for _, entry in entries if entry.state == "admitted"]
    missing = [update_id for update_id in receipts if admitted[update_id] != 1]
    known = {entry.update_id for _, entry in entries}
    strangers = [update_id for update_id in admitted if update_id not in known]
    doubled = [update_id for update_id, count in admitted.items() if count > 1]
    rounds = Counter((name, entry.round_id) for name, entry in entries)
    refused = [entry for _, entry in entries if entry.state == "refused"]
    return [
        Finding(
            "every update with a receipt is in the journal exactly once",
            f"{len(receipts)} receipts, {len(missing)} missing, {len(doubled)} doubled",
            not missing and not doubled and len(receipts) > 0,
        ),
        Finding(
            "no update in the journal that no node made",
            f"{len(strangers)} strangers",
            not strangers,
        ),
        Finding(
            "every round left one update, and none was refused",
            f"{len(entries)} updates of {len(rounds)} rounds, {len(refused)} refused",
            max(rounds.values(), default=1) == 1 and not refused,
        ),
    ]


def _merged_once(events: list[Event]) -> Finding:
    """An update may be in one accepted release at most.

    It may be planned again only after it was requeued.
    """
    plans = {
        event.subject: json.loads(event.body["plan"])
        for event in events
        if event.kind == EventKind.MERGE_PLANNED
    }
    plan_of = {
        event.subject: event.body["plan_id"]
        for event in events
        if event.kind == EventKind.CANDIDATE_BUILT
    }
    merged: Counter[str] = Counter()
    for event in events:
        if event.kind == EventKind.VERDICT and event.body["accepted"]:
            merged.update(_update_ids(plans[plan_of[event.subject]]))
    twice = [update_id for update_id, count in merged.items() if count > 1]
    return Finding(
        "no update is merged twice", f"{len(merged)} merged, {len(twice)} twice", not twice
    )


def _update_ids(plan: Mapping[str, Any]) -> list[str]:
    return [str(entry["update_id"]) for entry in plan["updates"]]


def _experience_finding(root: Path, name: str, acknowledged: Acknowledged) -> Finding:
    """Read with SQL of our own: the promise is about what is on disk."""
    path = root / "nodes" / name / "experience.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        interactions = {row[0] for row in database.execute("SELECT id FROM interactions")}
        feedback = {row[0] for row in database.execute("SELECT id FROM feedback")}
    lost = [i for i in acknowledged.answers if i not in interactions]
    lost_feedback = [i for i in acknowledged.feedback if i not in feedback]
    return Finding(
        f"node {name} kept every answer and feedback that it acknowledged",
        f"{len(acknowledged.answers)} answers, {len(lost)} lost; "
        f"{len(acknowledged.feedback)} feedback, {len(lost_feedback)} lost; "
        f"{acknowledged.repeats} repeats; {len(acknowledged.unexpected)} unexpected"
        + "".join(f"\n{text}" for text in acknowledged.unexpected[:3]),
        not lost
        and not lost_feedback
        and not acknowledged.unexpected
        and len(acknowledged.answers) > 0,
    )


def _all_events(journal: Journal) -> list[Event]:
    events: list[Event] = []
    while page := journal.events(after=events[-1].sequence if events else 0, limit=1000):
        events.extend(page)
    return events
