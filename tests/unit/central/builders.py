"""Builders of journal events for the unit tests of central."""

from __future__ import annotations

import base64
import hashlib

from central.journal import EventKind, Journal, MergePlan, NewEvent, PlannedUpdate
from protos.manifest import Payload, ReleaseManifest, Start, UpdateManifest

AT = "2026-11-22T12:00:00.000000Z"
BASE = hashlib.sha256(b"base").hexdigest()


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_release(cohort: str = "shared", version: int = 0, **fields: object) -> ReleaseManifest:
    values: dict[str, object] = {
        "base": BASE,
        "cohort": cohort,
        "version": version,
        "parent": None,
        "plan": None,
        "payload": Payload(digest_sha256=digest_of(f"payload {cohort} {version}"), size_bytes=10),
        "rank": 0,
        "truncation_error": 0.0,
        "updates": [],
        "created_at": AT,
    }
    return ReleaseManifest.model_validate({**values, **fields})


def make_update(
    start: ReleaseManifest, node_id: str = "a-00000000", sequence: int = 1, **fields: object
) -> UpdateManifest:
    values: dict[str, object] = {
        "node_id": node_id,
        "sequence": sequence,
        "base": BASE,
        "start": Start(
            release=start.digest,
            payload=start.payload.digest_sha256,
            prefix_rank=start.rank,
            dtype="float32",
        ),
        "rank": 4,
        "payload": Payload(digest_sha256=digest_of(f"update {node_id} {sequence}"), size_bytes=100),
        "round_id": f"round-{sequence}",
        "experiences": 8,
        "created_at": AT,
        "software": "tests",
    }
    return UpdateManifest.model_validate({**values, **fields})


def cohort_created(genesis: ReleaseManifest) -> NewEvent:
    return NewEvent(
        EventKind.COHORT_CREATED, genesis.cohort, genesis.digest, _signed(genesis.to_bytes())
    )


def token_created(cohort: str = "shared", token_id: str = "token", uses: int = 10) -> NewEvent:
    body = {
        "secret_sha256": digest_of("secret"),
        "uses": uses,
        "expires_at": "2999-01-01T00:00:00Z",
    }
    return NewEvent(EventKind.TOKEN_CREATED, cohort, token_id, body)


def node_enrolled(
    node_id: str = "a-00000000", cohort: str = "shared", token_id: str = "token"
) -> NewEvent:
    body = {
        "name": node_id.rsplit("-", 1)[0],
        "token_id": token_id,
        "public_key_pem": "pem",
        "base": BASE,
        "certificate_sha256": digest_of(node_id),
    }
    return NewEvent(EventKind.NODE_ENROLLED, cohort, node_id, body)


def admitted(update: UpdateManifest, cohort: str = "shared") -> NewEvent:
    return NewEvent(EventKind.UPDATE_ADMITTED, cohort, update.digest, _signed(update.to_bytes()))


def make_plan(parent: ReleaseManifest, *updates: UpdateManifest) -> MergePlan:
    return MergePlan(
        cohort=parent.cohort,
        parent=parent.digest,
        version=parent.version + 1,
        base=BASE,
        updates=[
            PlannedUpdate(
                update_id=update.digest,
                payload=update.payload.digest_sha256,
                weight=1 / len(updates),
            )
            for update in updates
        ],
        strategy="product-mean",
        rank=32,
        server_step=1.0,
        seed=0,
        exact_rank=512,
        software="tests",
        created_at=AT,
    )


def planned(plan: MergePlan) -> NewEvent:
    return NewEvent(
        EventKind.MERGE_PLANNED, plan.cohort, plan.digest, {"plan": plan.to_bytes().decode()}
    )


def make_candidate(plan: MergePlan) -> ReleaseManifest:
    return make_release(
        plan.cohort,
        plan.version,
        parent=plan.parent,
        plan=plan.digest,
        rank=32,
        updates=[update.update_id for update in plan.updates],
    )


def built(candidate: ReleaseManifest) -> NewEvent:
    body = {"plan_id": candidate.plan, **_signed(candidate.to_bytes())}
    return NewEvent(EventKind.CANDIDATE_BUILT, candidate.cohort, candidate.digest, body)


def decided(candidate: ReleaseManifest, accepted: bool, text: str = "as measured") -> NewEvent:
    body = {"accepted": accepted, "text": text, "environments": {}, "high_water": {}}
    return NewEvent(EventKind.VERDICT, candidate.cohort, candidate.digest, body)


def promoted(release: ReleaseManifest, channel: str = "stable") -> NewEvent:
    return NewEvent(
        EventKind.PROMOTED, release.cohort, release.digest, {"channel": channel, "by": "tests"}
    )


def rolled_back(
    target: ReleaseManifest, *abandoned: ReleaseManifest, updates: str = "requeue"
) -> NewEvent:
    body = {
        "from_release": abandoned[-1].digest,
        "abandoned": [release.digest for release in abandoned],
        "updates": updates,
        "by": "tests",
    }
    return NewEvent(EventKind.ROLLED_BACK, target.cohort, target.digest, body)


def start_cohort(
    journal: Journal, cohort: str = "shared", nodes: tuple[str, ...] = ("a-00000000",)
) -> ReleaseManifest:
    """A cohort with its version 0, a token and enrolled nodes."""
    genesis = make_release(cohort)
    token_id = f"token-{cohort}"
    journal.append(
        cohort_created(genesis),
        token_created(cohort, token_id),
        *(node_enrolled(node_id, cohort, token_id) for node_id in nodes),
    )
    return genesis


def _signed(data: bytes) -> dict[str, str]:
    return {"manifest": data.decode(), "signature": base64.b64encode(b"signature").decode()}
