"""What a crash test compares: what the journal and the blobs hold when a story has ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from central.blobs import DirectoryBlobs
from central.journal import EventKind, Journal, State
from protos.manifest import ReleaseManifest
from tests.contract import central_harness as harness

PAYLOADS = [harness.encode_factors(seed) for seed in range(6)]
"""What the nodes of a story upload, in this order."""


@dataclass(frozen=True)
class Ending:
    """What must be the same with and without a kill."""

    payloads: list[str]
    """Digests of the payloads of every cohort's stable line, oldest first: bit-identical."""
    server_states: list[str | None]
    """Of the same releases."""
    merged_in: list[tuple[int, str]]
    """Of each update in order of upload: version of the release that holds it (0: none), state."""
    admissions: int
    verdicts: list[bool]
    looks: list[int]
    """Of every evaluation offer."""
    rollbacks: int
    leftovers: list[str]
    """Unfinished uploads and temporary files."""
    resent_bytes: int = field(compare=False)
    """Bytes of payloads that nodes sent again after a kill."""


def read_ending(data: Path, resent_bytes: int) -> Ending:
    """Of the data directory of a central that does not run."""
    journal = Journal(f"sqlite:///{data}/journal.db")
    blobs = DirectoryBlobs(data / "blobs")
    try:
        journal.verify()
        kinds = [event.kind for event in journal.events()]
        looks = [
            e.body.get("look", 1)
            for e in journal.events()
            if e.kind is EventKind.EVALUATION_OFFERED
        ]
        verdicts = [
            bool(e.body["accepted"]) for e in journal.events() if e.kind is EventKind.VERDICT
        ]
        with journal.read() as state:
            line = [
                release for cohort in state.cohorts() for release in _stable_line(state, cohort)
            ]
            for release in state.releases.values():
                blobs.read(release.manifest.payload.digest_sha256)
            updates = sorted(state.updates.values(), key=lambda update: update.manifest.sequence)
            for update in updates:
                assert (
                    blobs.read(update.manifest.payload.digest_sha256)
                    == PAYLOADS[update.manifest.sequence - 1]
                )
            return Ending(
                payloads=[release.payload.digest_sha256 for release in line],
                server_states=[state.releases[release.digest].server_state for release in line],
                merged_in=[
                    (
                        state.releases[update.release_id].manifest.version
                        if update.release_id
                        else 0,
                        update.state,
                    )
                    for update in updates
                ],
                admissions=kinds.count(EventKind.UPDATE_ADMITTED),
                verdicts=verdicts,
                looks=looks,
                rollbacks=kinds.count(EventKind.ROLLED_BACK),
                leftovers=[p.name for pattern in ("*.part", "*.tmp") for p in data.rglob(pattern)],
                resent_bytes=resent_bytes,
            )
    finally:
        journal.close()


def _stable_line(state: State, cohort: str) -> list[ReleaseManifest]:
    line: list[ReleaseManifest] = []
    head = state.head(cohort)
    while head is not None:
        line.insert(0, head.manifest)
        head = state.releases.get(head.manifest.parent or "")
    return line
