"""Answers of the operator service as lines for people.

In: messages. Out: lines without line breaks; the caller removes control characters.
"""

from __future__ import annotations

from collections.abc import Iterator

from central.operator.client import plain
from protos.operator.v1 import operator_pb2
from protos.updates.v1 import updates_pb2


def explanation(answer: operator_pb2.ExplainReleaseResponse) -> Iterator[str]:
    """`central releases explain`."""
    release = answer.release
    state = plain(release)["state"]
    yield f"{release.version} of {release.cohort}: {state}, made {release.created_at}, id {release.release_id}"
    if answer.strategy:
        composed = f", composed with {answer.builds_on_version}" if answer.builds_on_version else ""
        yield (
            f"built on {release.parent_id[:8]}{composed} by {answer.strategy}, server step {answer.server_step:g}, rank {release.rank}, "
            f"truncation error {release.truncation_error:g} ({answer.software})"
        )
    if answer.part_of:
        yield f"a part of the rejected {answer.part_of}, tried to find the update that hurts"
    if answer.builds_on_state == operator_pb2.RELEASE_STATE_ABANDONED:
        yield f"{answer.builds_on_version} was rolled back since: the next composition is with its cohort's stable release"
    if answer.builds_on_state == operator_pb2.RELEASE_STATE_WITHDRAWN:
        yield f"{answer.builds_on_version} was withdrawn since, it holds something forgotten: the next composition is without it"
    yield f"updates: {len(answer.contributions) or _why_none(answer)}"
    for part in answer.contributions:
        clipped = f" (clipped to {part.factor:.3g} of itself)" if part.factor != 1 else ""
        yield (
            f"  {part.update_id[:12]} from {part.node_id}, weight {part.weight:.6g}{clipped}, its number {part.sequence}, trained "
            f"on {part.start_release_id[:8]}, admitted {part.admitted_at}"
        )
    if answer.filter:
        yield f"filter: {answer.filter}; left out: {len(answer.left_out) or 'none'}"
    for left_out in answer.left_out:
        yield f"  {left_out.update_id[:12]} from {left_out.node_id}: {left_out.reason}"
    if answer.fate:
        yield f"what became of them: {answer.fate}"
    if answer.exactness:
        yield f"taken out: {len(answer.removed)}; {answer.exactness}"
    for part in answer.removed:
        yield f"  {part.update_id[:12]} from {part.node_id}, which had weight {part.weight:.6g}"
    if answer.forgotten_update_ids:
        yield f"it holds what was forgotten since: {', '.join(u[:12] for u in answer.forgotten_update_ids)}"
    if answer.updates_in_lineage:
        nodes = ", ".join(f"{node} {count}" for node, count in sorted(answer.updates_in_lineage.items()))
        yield f"with its ancestors it holds updates from: {nodes}"
    yield f"verdict{' ' + answer.decided_at if answer.decided_at else ''}: {release.verdict or 'none'}"
    for found in answer.environments:
        yield _finding(found)
    for report in release.evaluations:
        if report.abstain_reason:
            yield f"  {report.node_id} does not count: {report.abstain_reason}"
    for told in answer.canary_reports:
        yield f"canary at {told.node_id} {told.at}: {told.condition}{f', {told.problem}' if told.problem else ''}"
    if release.HasField("soak"):
        yield soak_line(release)
    for period in answer.periods:
        yield f"{period.channel} from {period.since} until {period.until or 'now'}, by {period.by}"
    if not answer.periods:
        yield "no channel ever pointed here"
    for served in answer.served:
        yield f"served at {served.node_id} from {served.since} until {served.until or 'now, as it said last'}"
    serving = ", ".join(f"{n.node_id}{'' if n.connected else f' (last seen {n.last_seen})'}" for n in answer.serving)
    yield f"serves now on: {serving or 'no node that has called since central started'}"


def freed(answer: operator_pb2.RollbackReleaseResponse) -> Iterator[str]:
    """What became of the updates of the releases that a rollback abandoned."""
    groups: dict[str, list[str]] = {}
    for update in answer.updates:
        state = plain(update)["state"]
        why = f": {update.reason}" if update.reason else ""
        words = "waiting to be merged again" if state == "waiting" else f"{state.replace('_', ' ')}{why}"
        groups.setdefault(words, []).append(f"{update.update_id[:12]} of {update.node_id}")
    for words, updates in groups.items():
        yield f"  {len(updates)} {words} ({', '.join(updates)})"


def soak_line(release: operator_pb2.Release) -> str:
    """Where a canary stands on its way to stable."""
    soak = release.soak
    serving = ", ".join(soak.serving) or "no node"
    troubled = "".join(f"; trouble at {node}: {problem}" for node, problem in sorted(soak.troubled.items()))
    then = f"stable at {soak.promotes_at} after" if soak.promotes_at else "waits for"
    return (
        f"canary of {release.cohort}: {release.version} since {soak.since}, served by {serving}{troubled}; {then} "
        f"{soak.waits_for}. Nothing more is merged before."
    )


def difference(answer: operator_pb2.DiffReleasesResponse) -> Iterator[str]:
    """`central releases diff`."""
    yield f"from {answer.version_a} to {answer.version_b}"
    for word, updates in (("added", answer.added), ("removed", answer.removed)):
        yield f"updates {word}: {len(updates) or 'none'}"
        for update in updates:
            yield f"  {update.update_id[:12]} from {update.node_id}, its number {update.sequence}"
    yield f"change of the product, relative to {answer.version_a}: all modules {_change(answer.all_modules)}"
    for module in sorted(answer.modules, key=lambda module: -module.relative_change):
        yield f"  {module.module} {_change(module)}"
    for found in answer.environments:
        rates = (_rate(found.passed_a, found.total_a), _rate(found.passed_b, found.total_b))
        yield f"{found.environment}: {' -> '.join(rates)}"


def proposal(order: operator_pb2.ForgetOrder) -> Iterator[str]:
    """`central forget`: what is or would be done."""
    whose = f"node {order.node_id}" if order.node_id else "one update"
    word = "would be forgotten" if order.state == operator_pb2.FORGET_STATE_PROPOSED else "are to be forgotten"
    yield f"{whose} of {order.cohort}: {len(order.in_release) + len(order.unreleased)} updates {word}"
    for update in order.unreleased:
        yield f"  {update.update_id[:12]} from {update.node_id}: in no release that stable stands on; with the order itself"
    for update in order.in_release:
        yield f"  {update.update_id[:12]} from {update.node_id}: in the stable release; with a new release without it"
    yield f"how: {order.exactness}"
    if order.in_release:
        who = f"released whatever the gate finds, as {order.by} says" if order.accept_loss else "the gate decides on it"
        yield f"the new release: {who}; what others learnt from a release that held it is not taken out"
    for cohort in order.composed_cohorts:
        yield f"{cohort} builds on a release that holds it: it is composed anew, and holds it until its gate accepts that"
    if order.holders:
        yield f"can no longer be promoted or returned to afterwards: {', '.join(order.holders)}"


def cancelled(order: operator_pb2.ForgetOrder) -> Iterator[str]:
    """`central forget --cancel`."""
    yield f"order {order.order_id[:8]} is {order.verdict}: what was merged is still there ({len(order.in_release)})"
    for update in order.unreleased:
        if update.state == updates_pb2.UPDATE_STATE_FORGOTTEN:
            yield f"  {update.update_id[:12]} from {update.node_id} was in no release; it was forgotten with the order and stays so"


def progress(order: operator_pb2.ForgetOrder) -> str:
    """Where an order stands, in one line."""
    name = f"order {order.order_id[:8]}"
    held_up = f"; it waits for {order.waits_for}" if order.waits_for else ""
    if order.state == operator_pb2.FORGET_STATE_ORDERED:
        return f"{name} is planned with the cohort's next merge{held_up}"
    if order.state == operator_pb2.FORGET_STATE_PLANNED:
        made = f"{order.candidate} is made and evaluated" if order.candidate else "the release without it is being made"
        return f"{name}: {made}{held_up}"
    if order.state == operator_pb2.FORGET_STATE_DONE:
        return f"{name} is done{f': {order.candidate} is released. {order.verdict}' if order.candidate else ''}"
    return f"{name} {plain(order)['state']}: {order.verdict}"


def _why_none(answer: operator_pb2.ExplainReleaseResponse) -> str:
    if not answer.strategy:
        return "none, this is the base model"
    return "none of its own" if answer.builds_on_version else "none"


def _finding(found: operator_pb2.EnvironmentFinding) -> str:
    counts = (found.both_passed, found.only_reference_passed, found.only_candidate_passed, found.neither_passed)
    text = f"  {'anchor ' if found.anchor else ''}{found.environment}: {_rates(*counts)}"
    if found.HasField("every_attempt"):
        every = found.every_attempt.outcomes
        counts = (every.both_passed, every.only_reference_passed, every.only_candidate_passed, every.neither_passed)
        text += f", all of {found.attempts} attempts {_rates(*counts)}"
    if found.reference_id:
        text += f", against {found.reference_id[:8]}"
        if found.fallback_reason:
            text += f" (its high-water release could not be used: {found.fallback_reason})"
    text += f", {found.nodes} nodes"
    # Old verdicts only say whether it fell.
    standing = found.standing or ("fell" if found.fell else "")
    return f"{text}{f', {standing}' if standing else ''}{', better than ever' if found.better else ''}"


def _rates(both: int, only_reference: int, only_candidate: int, neither: int) -> str:
    total = both + only_reference + only_candidate + neither
    return f"{_rate(both + only_reference, total)} -> {_rate(both + only_candidate, total)}"


def _change(module: operator_pb2.ModuleChange) -> str:
    return f"{100 * module.relative_change:.3g} %" if module.norm_a > 0 else f"new, norm {module.norm_b:.3g}"


def _rate(passed: int, total: int) -> str:
    return f"{100 * passed / total:.1f} % ({passed} of {total})" if total else "not measured"


def revoked(node_id: str, done: operator_pb2.RevokeNodeResponse) -> Iterator[str]:
    """What a revocation did."""
    yield f"Node {node_id} is revoked: neither its key nor its name is enrolled again, but for `central tokens create --readmit {node_id}`."
    if done.ended_uses:
        left = "The use" if done.ended_uses == 1 else f"The {done.ended_uses} uses"
        yield f"{left} left of the token that it came with ({done.token_id}) ended too."
    if done.other_node_ids:
        yield f"Nodes that came with the same token and stay: {', '.join(done.other_node_ids)}."
