"""What an event may expect of the state.

In: an event and a record's id. Out: the record. Errors: JournalConflict, which names the event and
what does not fit.
"""

from __future__ import annotations

from typing import Any, TypeVar

from central.journal.events import Event, JournalConflict
from central.journal.records import NodeRecord, ReleaseRecord
from central.journal.state.state import State

V = TypeVar("V")


def expect_new(event: Event, records: dict[str, Any]) -> None:
    if event.subject in records:
        raise conflict(event, f"{event.subject} exists already")


def expect_member(state: State, event: Event) -> NodeRecord:
    node = known(event, state.nodes, event.subject, "node")
    if node.cohort != event.cohort:
        raise conflict(event, f"node {node.node_id} is of cohort {node.cohort!r}")
    return node


def expect_accepted(state: State, event: Event, release_id: str) -> ReleaseRecord:
    release = known(event, state.releases, release_id, "release")
    if release.state != "accepted" or release.cohort != event.cohort:
        raise conflict(
            event,
            f"release {release_id} is {release.state} in cohort {release.cohort!r}, not accepted",
        )
    return release


def conflict(event: Event, text: str) -> JournalConflict:
    return JournalConflict(
        f"Event {event.kind} of {event.subject or event.cohort} does not fit the journal: {text}."
    )


def known(event: Event, records: dict[str, V], key: str, noun: str) -> V:
    if key not in records:
        raise conflict(event, f"{noun} {key!r} is not known")
    return records[key]
