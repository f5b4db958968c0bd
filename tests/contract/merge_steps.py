"""What tests of merge rules ask of a loop: the next release, its plan, a rebuild of all."""

from __future__ import annotations

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from central.cohort.verify import Finding, verify_releases
from central.journal import MergePlan, UpdateRecord
from central.settings import CentralSettings
from protos.manifest import ReleaseManifest
from tests.contract.cohort_loop import (
    KEY,
    Central,
    take_steps,
)


def merge(central: Central, settings: CentralSettings) -> ReleaseManifest:
    version = central.head().manifest.version + 1
    take_steps(central, settings, lambda: central.head().manifest.version == version)
    return central.head().manifest


def plan_of(central: Central) -> MergePlan:
    with central.journal.read() as state:
        return state.plans[central.head().manifest.plan or ""].plan


def record(central: Central, update_id: str) -> UpdateRecord:
    with central.journal.read() as state:
        return state.updates[update_id]


def verified(central: Central) -> list[Finding]:
    key = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with central.journal.read() as state:
        return list(
            verify_releases(state, list(state.releases.values()), central.blobs, key, deep=True)
        )


def all_identical(central: Central) -> bool:
    return {finding.outcome for finding in verified(central)} == {"identical"}
