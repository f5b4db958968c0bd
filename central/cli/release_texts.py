"""Releases as lines for people.

In: messages. Out: lines without line breaks; the caller removes control characters.
"""

from __future__ import annotations

from collections.abc import Iterator

from central.operators.client import plain
from protos.operators.v1 import operators_pb2


def explanation(answer: operators_pb2.ExplainReleaseResponse) -> Iterator[str]:
    """`central releases explain`."""
    release = answer.release
    state = plain(release)["state"]
    yield (
        f"{release.version} of {release.cohort}: {state}, made {release.created_at}, id "
        f"{release.release_id}"
    )
    if answer.strategy:
        composed = f", composed with {answer.builds_on_version}" if answer.builds_on_version else ""
        yield (
            f"built on {release.parent_id[:8]}{composed} by {answer.strategy}, server step "
            f"{answer.server_step:g}, rank {release.rank}, "
            f"truncation error {release.truncation_error:g} ({answer.software})"
        )
    if answer.part_of:
        yield f"a part of the rejected {answer.part_of}, tried to find the update that hurts"
    if answer.builds_on_state == operators_pb2.RELEASE_STATE_ABANDONED:
        yield (
            f"{answer.builds_on_version} was rolled back since: the next composition is with its "
            "cohort's stable release"
        )
    if answer.builds_on_state == operators_pb2.RELEASE_STATE_WITHDRAWN:
        yield (
            f"{answer.builds_on_version} was withdrawn since, it holds something forgotten: the "
            "next composition is without it"
        )
    yield f"updates: {len(answer.contributions) or _why_none(answer)}"
    for part in answer.contributions:
        clipped = f" (clipped to {part.factor:.3g} of itself)" if part.factor != 1 else ""
        yield (
            f"  {part.update_id[:12]} from {part.node_id}, weight {part.weight:.6g}{clipped}, its "
            f"number {part.sequence}, trained "
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
        yield (
            "it holds what was forgotten since: "
            f"{', '.join(u[:12] for u in answer.forgotten_update_ids)}"
        )
    if answer.updates_in_lineage:
        nodes = ", ".join(
            f"{node} {count}" for node, count in sorted(answer.updates_in_lineage.items())
        )
        yield f"with its ancestors it holds updates from: {nodes}"
    yield (
        f"verdict{' ' + answer.decided_at if answer.decided_at else ''}: "
        f"{release.verdict or 'none'}"
    )
    for found in answer.environments:
        yield _finding(found)
    for report in release.evaluations:
        if report.abstain_reason:
            yield f"  {report.node_id} does not count: {report.abstain_reason}"
    for told in answer.canary_reports:
        yield (
            f"canary at {told.node_id} {told.at}: "
            f"{told.condition}{f', {told.problem}' if told.problem else ''}"
        )
    if release.HasField("soak"):
        yield soak_line(release)
    for period in answer.periods:
        yield f"{period.channel} from {period.since} until {period.until or 'now'}, by {period.by}"
    if not answer.periods:
        yield "no channel ever pointed here"
    for served in answer.served:
        yield (
            f"served at {served.node_id} from {served.since} until "
            f"{served.until or 'now, as it said last'}"
        )
    serving = ", ".join(
        f"{n.node_id}{'' if n.connected else f' (last seen {n.last_seen})'}" for n in answer.serving
    )
    yield f"serves now on: {serving or 'no node that has called since central started'}"


def continual_lines(release: operators_pb2.Release) -> Iterator[str]:
    """What it and its ancestors gained and lost; nothing where the gate measured nothing."""
    if not release.HasField("continual"):
        return
    found = release.continual
    yield f"average success (ACC): {found.average:.1f} % over {found.environments} environments"
    for name, field in (
        ("change since learnt (backward transfer)", "backward_transfer"),
        ("gain before learnt (forward transfer)", "forward_transfer"),
        ("below its best (forgetting)", "forgetting"),
    ):
        if found.HasField(field):
            yield f"{name}: {getattr(found, field):+.1f} points"
    if found.worst_environment:
        yield (
            f"furthest below its best: {found.worst_environment}, {found.worst_best:.1f} % -> "
            f"{found.worst_now:.1f} %"
        )
    if found.HasField("every_attempt"):
        yield f"all {found.attempts} attempts (pass^{found.attempts}): {found.every_attempt:.1f} %"
    if found.HasField("kl_release"):
        yield (
            f"KL of its updates from their start: {found.kl_release:.3f} nats a token (mean of "
            f"{found.kl_updates})"
        )


def freed(answer: operators_pb2.RollbackReleaseResponse) -> Iterator[str]:
    """What became of the updates of the releases that a rollback abandoned."""
    groups: dict[str, list[str]] = {}
    for update in answer.updates:
        state = plain(update)["state"]
        why = f": {update.reason}" if update.reason else ""
        words = (
            "waiting to be merged again"
            if state == "waiting"
            else f"{state.replace('_', ' ')}{why}"
        )
        groups.setdefault(words, []).append(f"{update.update_id[:12]} of {update.node_id}")
    for words, updates in groups.items():
        yield f"  {len(updates)} {words} ({', '.join(updates)})"


def soak_line(release: operators_pb2.Release) -> str:
    """Where a canary stands on its way to stable."""
    soak = release.soak
    serving = ", ".join(soak.serving) or "no node"
    troubled = "".join(
        f"; trouble at {node}: {problem}" for node, problem in sorted(soak.troubled.items())
    )
    then = f"stable at {soak.promotes_at} after" if soak.promotes_at else "waits for"
    return (
        f"canary of {release.cohort}: {release.version} since {soak.since}, served by "
        f"{serving}{troubled}; {then} "
        f"{soak.waits_for}. Nothing more is merged before."
    )


def difference(answer: operators_pb2.DiffReleasesResponse) -> Iterator[str]:
    """`central releases diff`."""
    yield f"from {answer.version_a} to {answer.version_b}"
    for word, updates in (("added", answer.added), ("removed", answer.removed)):
        yield f"updates {word}: {len(updates) or 'none'}"
        for update in updates:
            yield f"  {update.update_id[:12]} from {update.node_id}, its number {update.sequence}"
    yield (
        f"change of the product, relative to {answer.version_a}: all modules "
        f"{_change(answer.all_modules)}"
    )
    for module in sorted(answer.modules, key=lambda module: -module.relative_change):
        yield f"  {module.module} {_change(module)}"
    for found in answer.environments:
        yield f"{found.environment}: {' -> '.join(_before_and_after(found))}"


def _why_none(answer: operators_pb2.ExplainReleaseResponse) -> str:
    if not answer.strategy:
        return "none, this is the base model"
    return "none of its own" if answer.builds_on_version else "none"


def _before_and_after(found: operators_pb2.EnvironmentChange) -> Iterator[str]:
    if not (found.HasField("likelihood_a") or found.HasField("likelihood_b")):
        yield _rate(found.passed_a, found.total_a)
        yield _rate(found.passed_b, found.total_b)
        return
    for measured in (found.likelihood_a, found.likelihood_b):
        yield (
            f"{measured.mean:.3f} nats a token ({measured.documents} documents)"
            if measured.documents
            else "not measured"
        )


def _outcomes(found: operators_pb2.EnvironmentFinding) -> str:
    if not found.HasField("likelihood"):
        return _rates(
            found.both_passed,
            found.only_reference_passed,
            found.only_candidate_passed,
            found.neither_passed,
        )
    texts = found.likelihood.outcomes
    return (
        f"{texts.reference_mean:.3f} -> {texts.candidate_mean:.3f} nats a token "
        f"({texts.documents} documents, {texts.tokens} tokens)"
    )


def _finding(found: operators_pb2.EnvironmentFinding) -> str:
    text = f"  {'anchor ' if found.anchor else ''}{found.environment}: {_outcomes(found)}"
    if found.HasField("every_attempt"):
        every = found.every_attempt.outcomes
        counts = (
            every.both_passed,
            every.only_reference_passed,
            every.only_candidate_passed,
            every.neither_passed,
        )
        text += f", all of {found.attempts} attempts {_rates(*counts)}"
    if found.reference_id:
        text += f", against {found.reference_id[:8]}"
        if found.fallback_reason:
            text += f" (its high-water release could not be used: {found.fallback_reason})"
    text += f", {found.nodes} nodes"
    # Old verdicts only say whether it fell.
    standing = found.standing or ("fell" if found.fell else "")
    return (
        f"{text}{f', {standing}' if standing else ''}{', better than ever' if found.better else ''}"
    )


def _rates(both: int, only_reference: int, only_candidate: int, neither: int) -> str:
    total = both + only_reference + only_candidate + neither
    return f"{_rate(both + only_reference, total)} -> {_rate(both + only_candidate, total)}"


def _change(module: operators_pb2.ModuleChange) -> str:
    return (
        f"{100 * module.relative_change:.3g} %"
        if module.norm_a > 0
        else f"new, norm {module.norm_b:.3g}"
    )


def _rate(passed: int, total: int) -> str:
    return f"{100 * passed / total:.1f} % ({passed} of {total})" if total else "not measured"
