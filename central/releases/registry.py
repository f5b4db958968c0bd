"""Releases, their lineage and channels.

In: payloads of merges, decisions of operators. Out: signed manifests, and journal events about
them. Guarantees: a payload is durable before the event that names it; a release never changes;
every method may be repeated. Blocks on disk: call it off the event loop.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from central import faults
from central.blobs.store import BlobStore
from central.errors import Reason, Refused
from central.journal import EventKind, Journal, MergePlan, NewEvent, ReleaseRecord, State
from central.releases.canary import promotion
from central.releases.difference import ModuleDifference, module_differences
from protos.lora import LoraTensors, decode, encode
from protos.manifest import Composition, Payload, ReleaseManifest, sha256_hex, sign

CHANNELS = ("stable", "canary")
COHORT_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
MIN_PREFIX_DIGITS = 6
MAX_NAMED = 5
"""An error names at most so many releases."""


@dataclass(frozen=True)
class Rollback:
    """What a rollback did."""

    release: ReleaseRecord
    abandoned: tuple[str, ...]
    """Ids of the releases that were given up, oldest first."""


class Registry:
    """One per central. `key` signs every manifest.

    `base` is the digest of central's base model. `builds_on` names the cohort that a cohort builds
    on; it counts when the cohort is made.
    """

    def __init__(
        self,
        journal: Journal,
        blobs: BlobStore,
        key: ec.EllipticCurvePrivateKey,
        base: str,
        builds_on: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._journal = journal
        self._blobs = blobs
        self._key = key
        self._base = base
        self._builds_on = builds_on

    def ensure_cohort(self, cohort: str) -> ReleaseRecord:
        """Version 0 of the cohort, made if it is missing; raises Refused for a bad name."""
        if not COHORT_NAME.fullmatch(cohort):
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT,
                Reason.BAD_ARGUMENT,
                f"Cohort {cohort!r} is not a name. Expected 1 to 63 lower-case letters, digits, "
                "'.', '_' or '-'.",
            )
        other = self._builds_on.get(cohort)
        if other is not None:
            self.ensure_cohort(other)
        payload = encode(LoraTensors())
        digest = self._blobs.put(payload)
        with self._journal.read() as state:
            if cohort not in state.cohorts():
                manifest = ReleaseManifest(
                    base=self._base,
                    cohort=cohort,
                    version=0,
                    parent=None,
                    plan=None,
                    payload=Payload(digest_sha256=digest, size_bytes=len(payload)),
                    rank=0,
                    truncation_error=0.0,
                    updates=[],
                    created_at=self._journal.clock(),
                )
                self._put_again(state, payload)
                body = self._signed(manifest) | ({} if other is None else {"builds_on": other})
                self._journal.append(
                    NewEvent(EventKind.COHORT_CREATED, cohort, manifest.digest, body)
                )
            return state.genesis(cohort)

    def add_candidate(
        self,
        plan_id: str,
        payload: bytes,
        truncation_error: float,
        server_state: bytes | None = None,
        own: bytes | None = None,
        own_truncation_error: float = 0.0,
    ) -> ReleaseManifest:
        """Record what the plan's merge made, and its strategy's state for the next merge.

        A repeat returns the first candidate. `own` is the cohort's own product where `payload` is
        composed with another cohort's release. The manifest takes its time from the plan, so the
        same payload makes the same release id.

        Raises JournalConflict when the plan was cancelled meanwhile, LoraCodecError when the
        payload is not one.
        """
        rank = decode(payload).rank
        digest = self._blobs.put(payload)
        faults.reach("merge.candidate_kept")
        kept = {} if server_state is None else {"server_state": self._blobs.put(server_state)}
        if kept:
            faults.reach("merge.state_kept")
        kept_own = (
            None
            if own is None
            else Payload(digest_sha256=self._blobs.put(own), size_bytes=len(own))
        )
        if kept_own is not None:
            faults.reach("merge.own_kept")
        with self._journal.read() as state:
            record = state.plans[plan_id]
            if record.candidate is not None:
                return state.releases[record.candidate].manifest
            plan = record.plan
            manifest = ReleaseManifest(
                base=plan.base,
                cohort=plan.cohort,
                version=plan.version,
                parent=plan.parent,
                plan=plan_id,
                payload=Payload(digest_sha256=digest, size_bytes=len(payload)),
                rank=rank,
                truncation_error=truncation_error,
                updates=[update.update_id for update in plan.updates],
                composition=_composition(plan, kept_own, own_truncation_error),
                created_at=plan.created_at,
            )
            self._put_again(state, payload, server_state, own)
            body = {"plan_id": plan_id, **self._signed(manifest), **kept}
            self._journal.append(
                NewEvent(EventKind.CANDIDATE_BUILT, plan.cohort, manifest.digest, body)
            )
            return manifest

    def promote(self, release_id: str, channel: str, by: str) -> ReleaseRecord:
        """Point `channel` of the release's cohort at an accepted release; raises Refused."""
        _expect_channel(channel)
        with self._journal.read() as state:
            release = self._get(state, release_id)
            if release.state != "accepted":
                raise Refused(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    Reason.NOT_ACCEPTED,
                    f"Release {release.manifest.label} is {release.state}; only an accepted "
                    f"release can be promoted.{_forgotten(state, release)}",
                )
            _expect_ahead(state, release, channel)
            if state.channels.get((release.cohort, channel)) != release_id:
                self._journal.append(promotion(state, release, channel, by))
            return release

    def rollback(
        self,
        cohort: str,
        target: str | None,
        updates: Literal["requeue", "set_aside"],
        by: str,
        channel: str = "stable",
    ) -> Rollback:
        """Return the channel to `target` (None: its head's parent); raises Refused.

        What was built on the head since is abandoned. Stable takes a canary that is ahead of it
        back with it; a canary returns to stable at most.
        """
        _expect_channel(channel)
        with self._journal.read() as state:
            stable = state.head(cohort)
            if stable is None:
                raise unknown_cohort(state, cohort)
            head = stable if channel == "stable" else state.soaking(cohort)
            if head is None:
                raise _bad_argument(
                    f"Cohort {cohort!r} has no canary ahead of the stable head "
                    f"{stable.manifest.label}. To return stable to an earlier release, leave "
                    "--channel out."
                )
            goal = target or head.manifest.parent
            lineage = _ancestors(state, head)
            if channel != "stable":
                lineage = lineage[: lineage.index(stable.release_id) + 1]
            if goal is None or goal not in lineage:
                expected = (
                    ", ".join(state.releases[ancestor].manifest.label for ancestor in lineage)
                    or "none"
                )
                raise _bad_argument(
                    f"The {channel} channel of cohort {cohort!r} cannot return to "
                    f"{_name(state, goal)}: it is not an ancestor of the {channel} head "
                    f"{head.manifest.label}{'' if channel == 'stable' else ' from stable on'}. "
                    f"Expected one of: {expected}."
                )
            if state.releases[goal].state == "withdrawn":
                clean = [state.releases[ancestor] for ancestor in lineage]
                labels = ", ".join(
                    ancestor.manifest.label for ancestor in clean if ancestor.state == "accepted"
                )
                raise _bad_argument(
                    f"Cohort {cohort!r} cannot return to "
                    f"{_name(state, goal)}.{_forgotten(state, state.releases[goal])} Expected one "
                    f"of: {labels}."
                )
            abandoned = _built_since(state, head, goal, lineage)
            body = {
                "from_release": head.release_id,
                "abandoned": abandoned,
                "updates": updates,
                "by": by,
            }
            if channel != "stable":
                body["channel"] = channel
            self._journal.append(NewEvent(EventKind.ROLLED_BACK, cohort, goal, body))
            return Rollback(state.releases[goal], tuple(abandoned))

    def difference(self, a: ReleaseRecord, b: ReleaseRecord) -> list[ModuleDifference]:
        """How the products of `b` differ from those of `a`. Raises Refused, StorageError."""
        with self._journal.read() as state:
            expect_kept(state, a, b)
        first, second = (
            decode(self._blobs.read(release.manifest.payload.digest_sha256)) for release in (a, b)
        )
        return module_differences(first, second)

    def resolve(self, text: str, cohort: str | None = None) -> ReleaseRecord:
        """The release with this id, id prefix (6 digits or more) or version; raises Refused."""
        with self._journal.read() as state:
            return find_release(state, text, cohort)

    def _put_again(self, state: State, *payloads: bytes | None) -> None:
        """Put the payloads again that retention collected with an earlier candidate."""
        for payload in payloads:
            if payload is not None and sha256_hex(payload) in state.collected:
                self._blobs.put(payload)

    def _signed(self, manifest: ReleaseManifest) -> dict[str, str]:
        data = manifest.to_bytes()
        return {
            "manifest": data.decode(),
            "signature": base64.b64encode(sign(self._key, data)).decode(),
        }

    def _get(self, state: State, release_id: str) -> ReleaseRecord:
        if release_id not in state.releases:
            raise _unknown(
                f"Release {release_id!r} is not known. `central releases list` shows them."
            )
        return state.releases[release_id]


def find_release(state: State, text: str, cohort: str | None = None) -> ReleaseRecord:
    """The release with this id, id prefix (6 digits or more) or version; raises Refused."""
    fitting = [
        release
        for release in state.releases.values()
        if release.label == text
        or (len(text) >= MIN_PREFIX_DIGITS and release.release_id.startswith(text))
    ]
    found = [release for release in fitting if cohort in (None, "", release.cohort)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(
        f"{release.manifest.label} of {release.cohort}"
        for release in (found or fitting)[:MAX_NAMED]
    )
    if found:
        raise _unknown(
            f"Release {text!r} fits {len(found)} releases: {names}. Give more digits of its id."
        )
    if fitting:
        raise _unknown(f"Release {text!r} is not one of cohort {cohort!r}: it fits {names}.")
    raise _unknown(
        f"Release {text!r} is not known. Expected an id, {MIN_PREFIX_DIGITS} or more of its first "
        "digits, or a version such as v3-7f3a9c01; `central releases list` shows them."
    )


def _composition(
    plan: MergePlan, own: Payload | None, truncation_error: float
) -> Composition | None:
    if own is None or plan.builds_on is None:
        return None
    return Composition(builds_on=plan.builds_on, own=own, own_truncation_error=truncation_error)


def _expect_channel(channel: str) -> None:
    if channel not in CHANNELS:
        raise _bad_argument(
            f"Channel {channel!r} is not known. Expected one of {', '.join(CHANNELS)}."
        )


def _expect_ahead(state: State, release: ReleaseRecord, channel: str) -> None:
    """Raises Refused unless the channel moves forward along one line.

    Then nothing that was merged is left beside the line.
    """
    stable, canary = state.head(release.cohort), state.soaking(release.cohort)
    name = f"Release {release.manifest.label}"
    if stable is not None and not state.descends(release, stable):
        where = "an ancestor of" if state.descends(stable, release) else "not built on"
        raise _bad_argument(
            f"{name} is {where} the stable head {stable.manifest.label}. Use `central releases "
            "rollback`, which also says what happens to the updates in between."
        )
    if canary is not None and not state.descends(release, canary):
        raise _bad_argument(
            f"{name} lacks what the canary {canary.manifest.label} holds. Promote that one to "
            f"stable, or take it back with `central releases rollback --cohort {release.cohort} "
            "--channel canary`, which says what happens to its updates."
        )


def expect_kept(state: State, *releases: ReleaseRecord) -> None:
    """Raises Refused when retention collected a payload of one of the releases."""
    for release in releases:
        if gone := state.collected.get(release.manifest.payload.digest_sha256):
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                Reason.NOT_ACCEPTED,
                f"The payload of release {release.manifest.label} was {gone.text}; nobody can read "
                "it any more.",
            )


def unknown_cohort(state: State, cohort: str) -> Refused:
    """The refusal for an operator who names an unknown cohort."""
    return Refused(
        grpc.StatusCode.NOT_FOUND,
        Reason.UNKNOWN_COHORT,
        f"Cohort {cohort!r} is not known. Expected one of: "
        f"{', '.join(state.cohorts()) or 'none yet'}.",
    )


def _name(state: State, release_id: str | None) -> str:
    return state.releases[release_id].manifest.label if release_id else "a release before the base"


def _ancestors(state: State, release: ReleaseRecord) -> list[str]:
    """Ids from the release's parent down to version 0."""
    return [ancestor.release_id for ancestor in state.lineage(release.release_id)[1:]]


def _built_since(state: State, head: ReleaseRecord, goal: str, lineage: list[str]) -> list[str]:
    """The head's line above `goal` and the accepted or withdrawn releases off that line.

    The oldest comes first.
    """
    line = {head.release_id, *lineage[: lineage.index(goal)]}
    abandoned: list[str] = []
    for release in state.releases.values():  # a parent is recorded before its children
        built_on = release.release_id in line or release.manifest.parent in abandoned
        if built_on and release.state in ("accepted", "withdrawn"):
            abandoned.append(release.release_id)
    return abandoned


def _forgotten(state: State, release: ReleaseRecord) -> str:
    """Why a withdrawn release cannot be used, as a sentence; empty for others."""
    held = state.forgotten_in(release.release_id) if release.state == "withdrawn" else []
    named = ", ".join(
        f"{update[:12]} of {state.updates[update].manifest.node_id}" for update in held
    )
    return f" It holds a contribution that was forgotten ({named})." if held else ""


def _bad_argument(message: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, Reason.BAD_ARGUMENT, message)


def _unknown(message: str) -> Refused:
    return Refused(grpc.StatusCode.NOT_FOUND, Reason.UNKNOWN_RELEASE, message)
