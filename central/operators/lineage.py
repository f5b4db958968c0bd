"""Where a release comes from, why it was accepted, where it serves, and how two releases differ.

In: the state, what nodes said last, differences of payloads. Out: messages. Everything is looked up
in the state, which is in memory: the journal is not read again, so an answer does not grow slower
with its length.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from central.fleet.presence import NodePresence
from central.journal import MergePlan, PlannedUpdate, ReleaseRecord, State, UpdateRecord
from central.journal.removal import exactness
from central.operators.listing import NO_SETTINGS, release_message, release_state, update_message
from central.releases.difference import ModuleDifference
from central.settings import ChannelSettings
from protos.operators.v1 import operators_pb2
from protos.releases.v1 import releases_pb2


def explain_release(
    state: State,
    release: ReleaseRecord,
    presence: Callable[[str], NodePresence],
    channels: ChannelSettings = NO_SETTINGS,
) -> operators_pb2.ExplainReleaseResponse:
    """Everything that the journal and the nodes say of one release or candidate."""
    plan = state.plans[release.plan_id].plan if release.plan_id else None
    verdict = release.verdict
    base = state.base_of(release) if release.manifest.composition else None
    return operators_pb2.ExplainReleaseResponse(
        release=release_message(state, release, channels),
        contributions=_contributions(state, plan.updates if plan else ()),
        filter=plan.filter if plan else "",
        left_out=[
            operators_pb2.LeftOut(
                update_id=left_out.update_id,
                node_id=state.updates[left_out.update_id].manifest.node_id,
                reason=left_out.reason,
            )
            for left_out in (plan.left_out if plan else ())
        ],
        environments=[_finding(name, figures) for name, figures in _environments(release).items()],
        periods=_periods(state, release),
        serving=[
            operators_pb2.ServingNode(
                node_id=node.node_id,
                connected=said.connected and not node.revoked,
                last_seen=said.last_seen,
            )
            for node in state.nodes.values()
            if (said := presence(node.node_id)).status.serving_release_id == release.release_id
        ],
        decided_at=verdict.at if verdict else "",
        strategy=plan.strategy if plan else "",
        server_step=plan.server_step if plan else 0.0,
        software=plan.software if plan else "",
        part_of=_part_of(state, release),
        canary_reports=[
            operators_pb2.CanaryReport(
                node_id=told.node_id, condition=told.condition, problem=told.problem, at=told.at
            )
            for told in state.canary_reports.get(release.release_id, ())
        ],
        builds_on_version=base.manifest.label if base else "",
        builds_on_state=release_state(base) if base else operators_pb2.RELEASE_STATE_UNSPECIFIED,
        updates_in_lineage=Counter(
            state.updates[u].manifest.node_id for u in _updates_in_lineage(state, release)
        ),
        removed=_contributions(state, plan.removal.updates if plan and plan.removal else ()),
        exactness=_exactness(state, plan),
        served=[
            operators_pb2.ServedPeriod(
                node_id=period.node_id, since=period.since, until=period.until
            )
            for period in state.served.get(release.release_id, ())
        ],
        fate=_fate(state, release),
        forgotten_update_ids=state.forgotten_in(release.release_id),
    )


def diff_releases(
    state: State, a: ReleaseRecord, b: ReleaseRecord, modules: Sequence[ModuleDifference]
) -> operators_pb2.DiffReleasesResponse:
    """What `b` has that `a` lacks, and the other way round."""
    in_a, in_b = (set(_updates_in_lineage(state, release)) for release in (a, b))
    in_order = sorted(
        (state.updates[u] for u in in_a ^ in_b), key=lambda update: update.admitted_sequence
    )
    first, second = _environments(a), _environments(b)
    total = ModuleDifference(
        "",
        *(
            math.hypot(*(getattr(module, key) for module in modules))
            for key in ("norm_a", "norm_b", "change")
        ),
    )
    return operators_pb2.DiffReleasesResponse(
        version_a=a.manifest.label,
        version_b=b.manifest.label,
        added=[update_message(update) for update in in_order if update.update_id in in_b],
        removed=[update_message(update) for update in in_order if update.update_id in in_a],
        modules=[_module(module) for module in modules],
        all_modules=_module(total),
        environments=[
            _environment(name, first, second) for name in sorted(first.keys() | second.keys())
        ],
    )


def _contributions(
    state: State, planned_updates: Iterable[PlannedUpdate]
) -> Iterator[operators_pb2.Contribution]:
    for planned in planned_updates:
        update = state.updates[planned.update_id]
        yield operators_pb2.Contribution(
            update_id=update.update_id,
            node_id=update.manifest.node_id,
            weight=planned.weight,
            sequence=update.manifest.sequence,
            start_release_id=update.manifest.start.release,
            admitted_at=update.admitted_at,
            factor=planned.factor,
        )


def _part_of(state: State, release: ReleaseRecord) -> str:
    rejected = state.plans[release.plan_id].isolates if release.plan_id else None
    candidate = state.plans[rejected].candidate if rejected else None
    return state.releases[candidate].manifest.label if candidate else ""


def _updates_in_lineage(state: State, release: ReleaseRecord) -> list[str]:
    """Updates in its own line, and in the release of another cohort that it builds on."""
    base = state.base_of(release)
    return [
        *state.contributions(release.release_id),
        *(state.contributions(base.release_id) if base else ()),
    ]


def _exactness(state: State, plan: MergePlan | None) -> str:
    if plan is None or plan.removal is None:
        return ""
    removal = plan.removal
    return exactness(state.releases[removal.since].manifest.label, removal.merges)


def _fate(state: State, release: ReleaseRecord) -> str:
    """Where the updates of a release or candidate that is not used stand now."""
    if release.state not in ("rejected", "abandoned", "withdrawn"):
        return ""
    standing = Counter(
        _stands(state, state.updates[update_id]) for update_id in release.manifest.updates
    )
    return "; ".join(f"{number} {words}" for words, number in standing.items())


def _stands(state: State, update: UpdateRecord) -> str:
    if update.state == "merged" and update.release_id:
        return f"merged in {state.releases[update.release_id].manifest.label}"
    words = {"waiting": "waiting to be merged", "planned": "in a merge under way"}
    return words.get(update.state, f"{update.state.replace('_', ' ')}: {update.reason}")


def _periods(state: State, release: ReleaseRecord) -> list[operators_pb2.ChannelPeriod]:
    found = []
    for (cohort, channel), changes in state.channel_changes.items():
        if cohort == release.cohort:
            ends = [change.at for change in changes[1:]] + [""]
            found += [
                operators_pb2.ChannelPeriod(
                    channel=channel, since=change.at, until=until, by=change.by
                )
                for change, until in zip(changes, ends, strict=True)
                if change.release_id == release.release_id
            ]
    return sorted(found, key=lambda period: period.since)


def _environments(release: ReleaseRecord) -> Mapping[str, Mapping[str, Any]]:
    return release.verdict.environments if release.verdict else {}


def _finding(name: str, figures: Mapping[str, Any]) -> operators_pb2.EnvironmentFinding:
    found = operators_pb2.EnvironmentFinding(
        environment=name,
        anchor=figures["anchor"],
        nodes=figures["nodes"],
        p_reference=figures["p_reference"],
        fell=figures["standing"] == "fell",
        reference_id=figures["reference"],
        standing=figures["standing"],
        p_fine=figures["p_fine"],
        better=figures["better"],
        fallback_reason=figures["fallback_reason"],
    )
    if outcomes := figures.get("likelihood"):
        found.likelihood.CopyFrom(
            operators_pb2.LikelihoodFinding(
                outcomes=releases_pb2.PairedLikelihood(**outcomes),
                fall_nats=figures["fall_nats"],
                tolerance_nats=figures["tolerance_nats"],
            )
        )
        return found
    found.both_passed = figures["both"]
    found.only_reference_passed = figures["only_reference"]
    found.only_candidate_passed = figures["only_candidate"]
    found.neither_passed = figures["neither"]
    found.fall_points = figures["fall_points"]
    found.tolerance_points = figures["tolerance_points"]
    found.attempts = figures["attempts"]
    if every := figures.get("every_attempt"):
        outcomes = releases_pb2.PairedOutcomes(
            both_passed=every["both"],
            only_reference_passed=every["only_reference"],
            only_candidate_passed=every["only_candidate"],
            neither_passed=every["neither"],
        )
        tests = {key: every[key] for key in ("fall_points", "p_reference", "p_fine")}
        found.every_attempt.CopyFrom(operators_pb2.EveryAttemptFinding(outcomes=outcomes, **tests))
    return found


def _module(module: ModuleDifference) -> operators_pb2.ModuleChange:
    return operators_pb2.ModuleChange(
        module=module.module,
        norm_a=module.norm_a,
        norm_b=module.norm_b,
        relative_change=module.change / module.norm_a if module.norm_a > 0 else 0.0,
    )


def _environment(
    name: str, first: Mapping[str, Mapping[str, Any]], second: Mapping[str, Mapping[str, Any]]
) -> operators_pb2.EnvironmentChange:
    (passed_a, total_a), (passed_b, total_b) = (
        _passes(found.get(name)) for found in (first, second)
    )
    return operators_pb2.EnvironmentChange(
        environment=name,
        passed_a=passed_a,
        total_a=total_a,
        passed_b=passed_b,
        total_b=total_b,
        likelihood_a=_mean(first.get(name)),
        likelihood_b=_mean(second.get(name)),
    )


def _passes(figures: Mapping[str, Any] | None) -> tuple[int, int]:
    if not figures or "likelihood" in figures:
        return (0, 0)
    return (figures["both"] + figures["only_candidate"], figures["total"])


def _mean(figures: Mapping[str, Any] | None) -> operators_pb2.MeanLikelihood | None:
    if not figures or "likelihood" not in figures:
        return None
    found = figures["likelihood"]
    return operators_pb2.MeanLikelihood(mean=found["candidate_mean"], documents=found["documents"])
