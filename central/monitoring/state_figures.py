"""Figures of the journal's state: updates, merges, releases, channels, nodes.

In: the journal, presence. Out: metric families. Guarantees: nothing here walks updates, releases or
events: numbers by state are indexes of the state. What is walked is what waits, and the nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime

from prometheus_client.core import Metric

from central.fleet.presence import Presence
from central.journal import Journal, NodeRecord, State, UpdateRecord
from central.merging.progress import under_way
from central.monitoring.families import counter, gauge

COHORT = ("cohort",)


def journal_figures(journal: Journal, failure: Callable[[str], str]) -> Iterator[Metric]:
    """`failure` says why a cohort's loop does not go on."""
    with journal.read() as state:
        cohorts = state.cohorts()
        waiting = {cohort: state.waiting(cohort) for cohort in cohorts}
        families = [*_counted(state, cohorts), *_channels(state)]
    yield from families
    now = journal.now()
    yield gauge(
        "update_waiting_oldest_seconds",
        "Age of the update that waits longest for a merge; 0 when none waits.",
        COHORT,
        {(cohort,): _oldest_s(found, now) for cohort, found in waiting.items()},
    )
    computed = Counter(merge.cohort for merge in under_way())
    yield gauge(
        "merges_computed_now",
        "Merges that this process computes now.",
        COHORT,
        {(cohort,): computed[cohort] for cohort in cohorts},
    )
    yield gauge(
        "cohort_standstill",
        "1 while the loop of a cohort fails and is tried again.",
        COHORT,
        {(cohort,): int(bool(failure(cohort))) for cohort in cohorts},
    )


def _counted(state: State, cohorts: list[str]) -> Iterator[Metric]:
    releases, verdicts = state.releases.numbers, state.releases.verdicts
    made = Counter[str]()
    for (cohort, _), number in releases.items():
        made[cohort] += number
    yield counter("journal_events_total", "Events in the journal.", (), {(): state.sequence})
    yield gauge("updates", "Admitted updates by state.", ("cohort", "state"), state.updates.numbers)
    yield gauge("releases", "Candidates and releases by state.", ("cohort", "state"), releases)
    yield counter(
        "merges_total",
        "Candidates that merges have built.",
        COHORT,
        {(cohort,): made[cohort] - 1 for cohort in cohorts},  # version 0 was not built
    )
    yield gauge(
        "merges_open",
        "Merges that are planned and have no verdict yet.",
        COHORT,
        {(cohort,): len(state.open_plans(cohort)) for cohort in cohorts},
    )
    yield counter(
        "verdicts_total",
        "Verdicts of the gate.",
        ("cohort", "verdict"),
        {
            (cohort, word): verdicts.get((cohort, accepted), 0)
            for cohort in cohorts
            for word, accepted in (("accepted", True), ("rejected", False))
        },
    )
    yield gauge(
        "forget_orders_pending",
        "Orders to forget whose removal is not released yet.",
        COHORT,
        {(cohort,): len(state.pending_forgets(cohort)) for cohort in cohorts},
    )


def _channels(state: State) -> Iterator[Metric]:
    heads = {key: state.releases[release].manifest for key, release in state.channels.items()}
    since = {key: state.channel_changes[key][-1].at for key in heads}
    yield gauge(
        "channel_version",
        "Version number of the release that a channel points at.",
        ("cohort", "channel"),
        {key: manifest.version for key, manifest in heads.items()},
    )
    yield gauge(
        "channel_changed_timestamp_seconds",
        "When the channel began to point at its release, in seconds since 1970.",
        ("cohort", "channel"),
        {key: datetime.fromisoformat(at).timestamp() for key, at in since.items()},
    )


def node_figures(journal: Journal, presence: Presence) -> Iterator[Metric]:
    """Numbers of nodes and what they say of themselves, by cohort; no node is named."""
    with journal.read() as state:
        nodes = list(state.nodes.values())
        serving = {node: period.release_id for node, period in state.serving.items()}
        heads = dict(state.channels)
    cohorts = list(dict.fromkeys(node.cohort for node in nodes))
    present = {(c, word): 0 for c in cohorts for word in ("connected", "away", "revoked")}
    numbers = {name: dict.fromkeys(((c,) for c in cohorts), 0) for name in _OF_NODES}
    for node in nodes:
        told = presence.of(node.node_id)
        present[node.cohort, _presence(node, told.connected)] += 1
        if node.revoked:
            continue
        head = heads.get((node.cohort, told.status.channel)) or heads[node.cohort, "stable"]
        on_head = serving.get(node.node_id) == head
        for name, number in (
            ("nodes_quarantined", bool(node.quarantine)),
            ("nodes_silent", bool(node.silent_since)),
            ("nodes_in_trouble", told.connected and bool(told.status.problems)),
            ("nodes_on_head", told.connected and on_head),
            ("node_updates_unsent", told.status.outbox_waiting + told.status.outbox_held),
            ("node_experiences", told.status.experiences),
        ):
            numbers[name][node.cohort,] += number
    yield gauge("nodes", "Enrolled nodes by presence.", ("cohort", "presence"), present)
    for name, text in _OF_NODES.items():
        yield gauge(name, text, COHORT, numbers[name])


_OF_NODES = {
    "nodes_quarantined": "Nodes whose updates are kept aside.",
    "nodes_silent": "Nodes that evaluations do not wait for.",
    "nodes_in_trouble": "Connected nodes that report a problem.",
    "nodes_on_head": "Connected nodes that serve the head of their channel.",
    "node_updates_unsent": "Updates in the outboxes of nodes, as they say.",
    "node_experiences": "What nodes can learn from, as they say.",
}


def _presence(node: NodeRecord, connected: bool) -> str:
    return "revoked" if node.revoked else "connected" if connected else "away"


def _oldest_s(waiting: list[UpdateRecord], now: datetime) -> float:
    ages = (now - datetime.fromisoformat(u.since or u.admitted_at) for u in waiting)
    return max((age.total_seconds() for age in ages), default=0.0)
