"""How a canary fares: which nodes serve it, which have trouble, and when it becomes stable.

In: the state, the cohort's channel policy, what nodes on the canary channel say. Out: where a soak
stands, and journal events. A canary soaks from the moment a node serves it without trouble; trouble
of any node on the channel ends that, and the soak counts anew once there is none. Guarantee: all of
it is in the journal, so a central that starts again neither forgets trouble nor begins the soak
anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from central.journal import CanaryReport, EventKind, Journal, NewEvent, ReleaseRecord, State
from central.settings import ChannelPolicy
from lorikeet.clock import written

MAX_TROUBLES = 10
"""Reports of trouble of one node with one release.

After these the node stays in trouble and a person decides. A flapping node must not fill the
journal.
"""
MAX_PROBLEM = 500
"""Characters of a problem that are kept."""


@dataclass(frozen=True)
class Soak:
    """A canary on its way to stable."""

    release: ReleaseRecord
    since: str
    """When the canary channel began to point at it; times are RFC 3339 UTC."""
    serving: tuple[str, ...]
    """Nodes on the channel that serve it without trouble."""
    troubled: Mapping[str, str]
    """What is wrong, by node."""
    promotes_at: str | None
    """When it becomes stable by itself.

    None: first an operator must act, a node must serve it, or somebody's trouble must end.
    """
    waits_for: str


def find_soak(state: State, cohort: str, policy: ChannelPolicy) -> Soak | None:
    """Where the cohort's soak stands; None when no canary is ahead of stable."""
    release = state.soaking(cohort)
    if release is None:
        return None
    last, clean_since = _conditions(state, release)
    serving = tuple(node_id for node_id, report in last.items() if report.condition == "serving")
    troubled = {
        node_id: report.problem for node_id, report in last.items() if report.condition == "trouble"
    }
    promotes_at = None
    if clean_since is not None and policy.soak_s > 0:
        end = datetime.fromisoformat(clean_since) + timedelta(seconds=policy.soak_s)
        promotes_at = written(end)
    since = state.channel_changes[(cohort, "canary")][-1].at
    return Soak(
        release,
        since,
        serving,
        troubled,
        promotes_at,
        _waits_for(release, policy, serving, troubled),
    )


def promotion(state: State, release: ReleaseRecord, channel: str, by: str) -> NewEvent:
    """The event that points `channel` at the release.

    When stable reaches the canary or leaves it behind, the event ends the canary too.
    """
    body: dict[str, object] = {"channel": channel, "by": by}
    canary = state.head(release.cohort, "canary")
    if channel == "stable" and canary is not None and state.descends(release, canary):
        body["ends"] = ["canary"]
    return NewEvent(EventKind.PROMOTED, release.cohort, release.release_id, body)


def record_report(
    journal: Journal, node_id: str, cohort: str, channel: str, serving: str, problem: str
) -> None:
    """Journal what a node's status says of the cohort's canary, if that changed.

    `serving` is the id of the release that the node serves.
    """
    with journal.read() as state:
        release = state.soaking(cohort)
        if release is None or state.nodes[node_id].revoked:
            return
        before = [
            report
            for report in state.canary_reports.get(release.release_id, ())
            if report.node_id == node_id
        ]
        condition = _condition(release, channel, serving, problem)
        last = before[-1].condition if before else "left"
        troubles = sum(report.condition == "trouble" for report in before)
        if condition in (None, last) or (
            last == "trouble" and troubles >= MAX_TROUBLES and condition == "serving"
        ):
            return
        kept = problem[:MAX_PROBLEM] if condition == "trouble" else ""
        body = {"node_id": node_id, "condition": condition, "problem": kept}
        journal.append(NewEvent(EventKind.CANARY_REPORTED, cohort, release.release_id, body))


def _condition(
    release: ReleaseRecord, channel: str, serving: str, problem: str
) -> Literal["serving", "trouble", "left"] | None:
    """None: it has not loaded the release yet."""
    if channel != "canary":
        return "left"
    if problem:
        return "trouble"
    return "serving" if serving == release.release_id else None


def _conditions(state: State, release: ReleaseRecord) -> tuple[dict[str, CanaryReport], str | None]:
    """The last report of every node that is not revoked, and since when all is well.

    All is well while a node serves the release and none has trouble.
    """
    last: dict[str, CanaryReport] = {}
    number: Counter[str] = Counter()
    clean_since = None
    for report in state.canary_reports.get(release.release_id, ()):
        if state.nodes[report.node_id].revoked:
            continue
        if before := last.get(report.node_id):
            number[before.condition] -= 1
        number[report.condition] += 1
        last[report.node_id] = report
        clean = number["serving"] > 0 and number["trouble"] == 0
        clean_since = (clean_since or report.at) if clean else None
    return last, clean_since


def _waits_for(
    release: ReleaseRecord,
    policy: ChannelPolicy,
    serving: tuple[str, ...],
    troubled: Mapping[str, str],
) -> str:
    by_hand = f"`central releases promote {release.manifest.label} --channel stable`"
    if troubled:
        return (
            f"the end of the trouble of {', '.join(troubled)}, or {by_hand} or a rollback of canary"
        )
    if not serving:
        return (
            "a node of the cohort that follows canary and serves it "
            f"(EDGE_RELEASES__CHANNEL=canary), or {by_hand}"
        )
    if policy.soak_s <= 0:
        return by_hand
    return f"the end of {policy.soak_s:g} s without trouble"
