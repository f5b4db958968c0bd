"""Which nodes are connected, and what they said of themselves last.

In: opened and closed watches, status reports. Out: a snapshot per node. In memory only: a restarted
central knows a node again as soon as it calls. Changed on the event loop alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from central.journal import utc_now
from central.printable import printable
from protos.fleet.v1 import fleet_pb2

MAX_TEXT = 500
MAX_ENVIRONMENTS = 256
MAX_REASONS = 32
MAX_PROBLEMS = 32
MAX_NAME = 64


@dataclass
class NodePresence:
    """`last_seen` is RFC 3339 UTC, empty when never seen."""

    watches: int = 0
    last_seen: str = ""
    status: fleet_pb2.NodeStatus = field(default_factory=fleet_pb2.NodeStatus)

    @property
    def connected(self) -> bool:
        return self.watches > 0


class Presence:
    """One per central."""

    def __init__(self, clock: Callable[[], str] = utc_now) -> None:
        self._clock = clock
        self._nodes: dict[str, NodePresence] = {}

    def of(self, node_id: str) -> NodePresence:
        """What is known of the node; an empty record when it was never seen."""
        return self._nodes.get(node_id, NodePresence())

    def is_connected(self, node_id: str) -> bool:
        """Whether the node watches now; may be asked from any thread."""
        return self.of(node_id).connected

    def opened(self, node_id: str) -> None:
        self._seen(node_id).watches += 1

    def closed(self, node_id: str) -> None:
        self._seen(node_id).watches -= 1

    def report(self, node_id: str, status: fleet_pb2.NodeStatus) -> None:
        """Keep what the node says of itself, cut to a bounded length.

        It is held in memory and shown to operators.
        """
        kept = fleet_pb2.NodeStatus()
        kept.CopyFrom(status)
        del kept.problems[:]
        kept.problems.extend(_problem(problem) for problem in status.problems[:MAX_PROBLEMS])
        kept.release_problem = kept.release_problem[:MAX_TEXT]
        kept.channel = kept.channel[:MAX_TEXT]
        kept.serving_release_id = kept.serving_release_id[:MAX_TEXT]
        kept.software_version = kept.software_version[:MAX_TEXT]
        kept.unusable_experiences.clear()
        for reason, count in list(status.unusable_experiences.items())[:MAX_REASONS]:
            kept.unusable_experiences[printable(reason[:MAX_TEXT])] = count
        del kept.environments[:]
        kept.environments.extend(name[:MAX_TEXT] for name in status.environments[:MAX_ENVIRONMENTS])
        self._seen(node_id).status = kept

    def _seen(self, node_id: str) -> NodePresence:
        node = self._nodes.setdefault(node_id, NodePresence())
        node.last_seen = self._clock()
        return node


def _problem(told: fleet_pb2.Problem) -> fleet_pb2.Problem:
    """The text, cut to a bounded length, without what could steer a terminal or break a line."""
    return fleet_pb2.Problem(
        room=printable(told.room[:MAX_NAME]),
        text=printable(told.text[:MAX_TEXT]),
        next_step=printable(told.next_step[:MAX_TEXT]),
        since=printable(told.since[:MAX_NAME]),
    )
