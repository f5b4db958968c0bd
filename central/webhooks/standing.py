"""Problems that stand: those that no journal event names, because they come and go by themselves.

In: what fails now, at each look. Out: what began and what is over since the look before. A problem
counts when it is there at two looks, and is over when it is gone at two: one that flickers is not
told each time. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from central.fleet.presence import Presence
from central.journal import NodeRecord
from central.journal.state import State

Problem = Mapping[str, Any]
LOOKS = 2


class Standing:
    """`known`: problems that were told, by key."""

    def __init__(self, known: Mapping[str, Problem]) -> None:
        self.known: dict[str, Problem] = dict(known)
        self._seen: dict[str, int] = {}
        """Looks at which a key was there and not known, or known and not there."""

    def look(
        self, now: Mapping[str, Problem], unclear: Callable[[str], bool]
    ) -> list[tuple[str, bool, Problem]]:
        """(key, whether it began, problem) of each change; `unclear`: nobody knows of this key."""
        odd = {key for key in now if key not in self.known}
        odd |= {key for key in self.known if key not in now and not unclear(key)}
        self._seen = {key: self._seen.get(key, 0) + 1 for key in odd}
        changes = []
        for key in sorted(key for key, looks in self._seen.items() if looks >= LOOKS):
            began = key in now
            changes.append((key, began, now[key] if began else self.known[key]))
            if began:
                self.known[key] = now[key]
            else:
                del self.known[key]
            del self._seen[key]
        return changes


def problems_now(
    cohorts: Iterable[str],
    nodes: Iterable[NodeRecord],
    presence: Presence,
    failure: Callable[[str], str],
    shortage: str,
) -> dict[str, Problem]:
    """What fails at central, and which connected nodes report problems, by key.

    A node has one key, whatever it reports: it cannot fill a queue.
    """
    found: dict[str, Problem] = {
        f"cohort {cohort}": {"cohort": cohort, "text": text}
        for cohort in cohorts
        if (text := failure(cohort))
    }
    if shortage:
        found["uploads"] = {"cohort": "", "text": shortage}
    for node in nodes:
        told = presence.of(node.node_id)
        if node.revoked or not told.connected:
            continue
        if problems := told.status.problems:
            found[f"node {node.node_id}"] = {
                "cohort": node.cohort,
                "node_id": node.node_id,
                "problems": [
                    {"room": one.room, "text": one.text, "next_step": one.next_step}
                    for one in problems
                ],
            }
    return found


def is_away(key: str, state: State, presence: Presence) -> bool:
    """Whether the problem is of a node that cannot say any more whether it is over."""
    word, _, node_id = key.partition(" ")
    node = state.nodes.get(node_id) if word == "node" else None
    return node is not None and not node.revoked and not presence.is_connected(node.node_id)
