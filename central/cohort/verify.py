"""Rebuilds releases from their plans and compares them with what was released.

In: the state, the blobs, releases. Out: one finding per release. Reads only. The parent's payload
and the updates' payloads go through the merge that made the release (payload.py). The digests of
payload and server state must come out again.

What is stored is read too: the bytes that would be served. Of a channel's head these are also the
cohort's own product and the strategy's state, which the next merge reads.

Guarantee: `identical` means two things. The release holds its parent and the updates of its plan,
with the plan's weights, and nothing else. Its bytes lie in the store as they were released. `deep`
shows the same of every ancestor, down to the empty version 0. Then no stored release is believed:
each is rebuilt on a parent that was rebuilt, or that has the digest of one that was.

Limit: the bytes are equal on one kind of machine, with the same processor, numpy and BLAS. The
number of BLAS threads in the environment does not matter, because a merge computes with one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from central.cohort.errors import FederationError, LostUpdate
from central.cohort.payload import MergedPayload, build_payload, plan_replies, standing_of
from central.cohort.strategies.flower import make_strategy
from central.cohort.strategies.product_mean import Blobs
from central.errors import StorageError
from central.journal import Journal, ReleaseRecord, State
from central.journal.payloads import release_blobs
from protos.lora import LoraTensors, encode
from protos.manifest import ManifestError, sha256_hex, verify

Outcome = Literal["identical", "differs", "failed", "damaged", "forgotten", "collected"]
"""What came out for a release.

- damaged: bytes of it that nodes or the next merge read are gone or altered in the store. This goes
  before every other outcome.
- forgotten: it cannot be rebuilt, because payloads went with a contribution that was forgotten.
- collected: it cannot be rebuilt, because retention collected payloads that no release on a
  reachable line needs.
"""


class PayloadCollected(StorageError):
    """What is read was collected; the message says when and why."""


@dataclass(frozen=True)
class Finding:
    """What came out for one release.

    `expected` and `rebuilt` are digests of payloads; `problem` is empty when identical.
    """

    release_id: str
    version: str
    cohort: str
    state: str
    outcome: Outcome
    updates: int
    expected: str
    rebuilt: str
    problem: str


def verify_releases(
    state: State,
    releases: Iterable[ReleaseRecord],
    blobs: Blobs,
    release_key_pem: bytes,
    deep: bool,
) -> Iterator[Finding]:
    """Findings in the order of the journal; `deep` adds the ancestors of every release."""
    chosen = {release.release_id for release in releases}
    if deep:
        chosen = {ancestor for release_id in chosen for ancestor in _line(state, release_id)}
    rebuilder = _Rebuilder(state, blobs)
    for release in state.releases.values():  # a parent is recorded before its children
        if release.release_id in chosen:
            yield _verify(state, release, rebuilder, release_key_pem)


def remake(journal: Journal, release: ReleaseRecord, blobs: Blobs) -> Mapping[str, bytes]:
    """What the release's plan makes, by digest: its payload, its own product, its strategy's state.

    Raises FederationError or StorageError when it cannot be made again.
    """
    with journal.read() as state:
        ready = _Rebuilder(state, blobs).prepare(release)
    merged = ready()  # a merge takes long: not under the journal's lock
    return {
        sha256_hex(data): data
        for data in (merged.data, merged.server_state, merged.own)
        if data is not None
    }


def _line(state: State, release_id: str) -> set[str]:
    """The release, its ancestors, what they are composed with, and the ancestors of that."""
    line = state.lineage(release_id)
    bases = {
        release.manifest.composition.builds_on for release in line if release.manifest.composition
    }
    return {release.release_id for release in line}.union(*(_line(state, base) for base in bases))


class _Rebuilder:
    """Rebuilds payloads; keeps the last one, because the next mostly builds on it."""

    def __init__(self, state: State, blobs: Blobs) -> None:
        self._state = state
        self._blobs = blobs
        self._last: dict[str, bytes] = {}

    def rebuild(self, release: ReleaseRecord) -> MergedPayload:
        """Raises FederationError or StorageError when it cannot be rebuilt."""
        merged = self.prepare(release)()
        made = (merged.data, merged.server_state, merged.own)
        self._last = {sha256_hex(data): data for data in made if data is not None}
        return merged

    def damage(self, release: ReleaseRecord) -> str:
        """What is wrong with the stored bytes that nodes or the next merge would read.

        Empty when nothing is, or when retention collected them. What the next merge reads counts
        only for the head of a channel.
        """
        is_head = release.release_id in self._state.channels.values()
        stored = release_blobs(release) if is_head else [release.manifest.payload.digest_sha256]
        try:
            for digest in stored:
                if digest not in self._state.collected:
                    self._blobs.read(digest)
        except StorageError as error:
            return str(error)
        return ""

    def read(self, digest: str) -> bytes:
        """What a merge reads: its parent, that one's server state, and its updates."""
        if digest in self._last:
            return self._last[digest]
        if gone := self._state.collected.get(digest):
            raise PayloadCollected(f"payload {digest[:12]} was {gone.text}")
        return self._blobs.read(digest)

    def prepare(self, release: ReleaseRecord) -> Callable[[], MergedPayload]:
        """Read of the state what the merge needs; what is returned does the merge."""
        if release.plan_id is None:
            return lambda: MergedPayload(encode(LoraTensors()), 0.0)
        plan = self._state.plans[release.plan_id].plan
        standing = standing_of(self._state, plan)
        strategy = make_strategy(plan, standing.start, self)

        def merge() -> MergedPayload:
            merged = build_payload(plan, standing, strategy, self, plan_replies(plan))
            if merged is None:
                raise FederationError(
                    f"{plan.strategy} made nothing of the plan's {len(plan.updates)} updates."
                )
            return merged

        return merge


def _verify(
    state: State, release: ReleaseRecord, rebuilder: _Rebuilder, release_key_pem: bytes
) -> Finding:
    expected, rebuilt = release.manifest.payload.digest_sha256, ""
    outcome: Outcome = "failed"
    problem = ""
    try:
        verify(release_key_pem, release.manifest_bytes, release.signature)
        merged = rebuilder.rebuild(release)
        rebuilt = sha256_hex(merged.data)
        problem = _difference(release, merged, rebuilt)
        outcome = "differs" if problem else "identical"
    except (StorageError, LostUpdate) as error:
        problem = str(error)
        if why := _forgotten(state, release):
            outcome, problem = "forgotten", f"{why}: {problem}"
        elif isinstance(error, PayloadCollected):
            outcome = "collected"
    except (FederationError, ManifestError) as error:
        problem = str(error)
    if lost := rebuilder.damage(release):
        outcome, problem = "damaged", f"what is stored of it: {lost}"
    manifest = release.manifest
    return Finding(
        release_id=release.release_id,
        version=manifest.label,
        cohort=release.cohort,
        state=release.state,
        outcome=outcome,
        updates=len(manifest.updates),
        expected=expected,
        rebuilt=rebuilt,
        problem=problem,
    )


def _forgotten(state: State, release: ReleaseRecord) -> str:
    """What was forgotten of what it is rebuilt from; empty when nothing was."""
    read = {*state.contributions(release.release_id), *state.removed(release)}
    gone = [update_id for update_id in read if state.updates[update_id].state == "forgotten"]
    named = ", ".join(f"{u[:12]} of {state.updates[u].manifest.node_id}" for u in sorted(gone))
    return (
        f"it is made with update {named}, which was forgotten, so its payload may be gone for good"
        if gone
        else ""
    )


def _difference(release: ReleaseRecord, merged: MergedPayload, rebuilt: str) -> str:
    manifest = release.manifest
    if rebuilt != manifest.payload.digest_sha256:
        return (
            f"the rebuilt payload has digest {rebuilt}, the release "
            f"{manifest.payload.digest_sha256}"
        )
    if merged.truncation_error != manifest.truncation_error:
        return (
            f"the rebuilt truncation error is {merged.truncation_error}, the release says "
            f"{manifest.truncation_error}"
        )
    own = None if merged.own is None else sha256_hex(merged.own)
    composition = manifest.composition
    if own != (composition.own.digest_sha256 if composition else None):
        return (
            f"the rebuilt own product has digest {own}, the release "
            f"{manifest.own_payload.digest_sha256}"
        )
    if composition is not None and merged.own_truncation_error != composition.own_truncation_error:
        return (
            f"the rebuilt truncation error of the own product is {merged.own_truncation_error}, "
            "the release says "
            f"{composition.own_truncation_error}"
        )
    state = None if merged.server_state is None else sha256_hex(merged.server_state)
    if state != release.server_state:
        return (
            f"the rebuilt server state has digest {state}, the one kept with the release "
            f"{release.server_state}"
        )
    return ""
