"""Spans of what the journal records: admission, merge, gate, release, rollback.

In: every event after its commit. Out: spans in the traces of updates and releases
(lorikeet/traces.py). The merge begins a release's trace, and links to the updates in it. A step
that began before this process did has no length.
"""

from __future__ import annotations

from collections import OrderedDict
from datetime import datetime

from central.journal import Event, EventKind, Journal
from lorikeet import traces

MOST = 1000
"""Steps under way whose beginning is remembered."""


class JournalTracer:
    """A listener of the journal; its calls neither block nor raise."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._began: OrderedDict[str, str] = OrderedDict()
        """Plan or release -> when its present step began."""

    def start(self) -> None:
        """Hear every event from now on."""
        self._journal.add_listener(self.heard)

    def heard(self, event: Event) -> None:
        """Runs under the journal's lock, so the state is the one after the event's group."""
        if event.kind is EventKind.UPDATE_ADMITTED:
            self._admitted(event)
        elif event.kind is EventKind.MERGE_PLANNED:
            self._begin(event.subject, event.at)
        elif event.kind is EventKind.CANDIDATE_BUILT:
            self._built(event)
        elif event.kind is EventKind.VERDICT:
            accepted = bool(event.body["accepted"])
            self._step("gate", event, accepted=accepted)
            if accepted:
                self._begin(event.subject, event.at)
        elif event.kind is EventKind.PROMOTED:
            self._step("release", event, channel=str(event.body["channel"]))
        elif event.kind is EventKind.ROLLED_BACK:
            self._step("rollback", event, channel=str(event.body.get("channel", "stable")))

    def _admitted(self, event: Event) -> None:
        with self._journal.read() as state:
            update = state.updates[event.subject].manifest
        traces.after(
            "admission",
            event.subject,
            0.0,
            update_id=event.subject,
            node_id=update.node_id,
            cohort=event.cohort,
            size_bytes=update.payload.size_bytes,
        )

    def _built(self, event: Event) -> None:
        with self._journal.read() as state:
            release = state.releases[event.subject]
        traces.after(
            "merge",
            event.subject,
            self._took_s(str(event.body["plan_id"]), event.at),
            first=True,
            links=release.manifest.updates,
            release_id=event.subject,
            release=release.label,
            cohort=event.cohort,
            updates=len(release.manifest.updates),
        )
        self._begin(event.subject, event.at)

    def _step(
        self, name: str, event: Event, *, accepted: bool | None = None, channel: str | None = None
    ) -> None:
        traces.after(
            name,
            event.subject,
            self._took_s(event.subject, event.at),
            release_id=event.subject,
            cohort=event.cohort,
            accepted=accepted,
            channel=channel,
        )

    def _begin(self, key: str, at: str) -> None:
        self._began[key] = at
        while len(self._began) > MOST:
            self._began.popitem(last=False)

    def _took_s(self, key: str, at: str) -> float:
        began = self._began.pop(key, at)
        took = datetime.fromisoformat(at) - datetime.fromisoformat(began)
        return max(0.0, took.total_seconds())
