"""Events about single contributions: an update is superseded, set aside, or waits again.

In: events. Out: changed records (transitions.py). `State` (state.py) has all events together.
"""

from __future__ import annotations

from central.journal.events import Event
from central.journal.transitions import REVOKED, Transitions, conflict, known


class Contributions(Transitions):
    """What happens to updates apart from merges, verdicts and rollbacks."""

    def _update_superseded(self, event: Event) -> None:
        by = known(event, self.updates, event.body["by"], "update")
        self._move(event, event.subject, "superseded", ("waiting",), f"superseded by the node's update {by.update_id}")

    def _update_set_aside(self, event: Event) -> None:
        self._cancel_plan_of(event)
        self._move(event, event.subject, "set_aside", ("waiting",), event.body["reason"])

    def _update_requeued(self, event: Event) -> None:
        update = known(event, self.updates, event.subject, "update")
        if self.nodes[update.manifest.node_id].revoked:
            raise conflict(event, REVOKED)
        self._cancel_plan_of(event)
        self._move(event, event.subject, "waiting", ("waiting", "set_aside"))
