"""A journal with an event of every kind, signed and sealed as central does it.

In: an empty folder. Out: events in the folder's journal. Used once for each released format, by
record_journal.py.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from central.blobs.directory import DirectoryBlobs
from central.heads import Heads
from central.journal import EventKind, Journal, LeftOut, MergePlan, NewEvent, PlannedUpdate
from central.journal.plan import Removal
from protos.manifest import Composition, Payload, ReleaseManifest, UpdateManifest, sign
from tests.unit.central import builders as make

SHARED, ACME = "shared", "acme"
CURVE = ec.SECP256R1()


class Clock:
    """A second passes between two events."""

    def __init__(self) -> None:
        self._seconds = 0

    def __call__(self) -> str:
        self._seconds += 1
        minutes, seconds = divmod(self._seconds, 60)
        return f"2026-11-22T12:{minutes:02}:{seconds:02}.000000Z"


class Recorder:
    """Central and its nodes, in one."""

    def __init__(self, data_dir: Path) -> None:
        self._key = ec.generate_private_key(CURVE)
        self._nodes = {
            node: ec.generate_private_key(CURVE) for node in ("a-1", "b-2", "c-3", "d-4")
        }
        heads = Heads(data_dir, DirectoryBlobs(data_dir / "blobs"), self._key)
        self._journal = Journal(f"sqlite:///{data_dir}/journal.db", Clock(), heads)
        self.public_key = _pem(self._key)
        self._version = 0

    def close(self) -> None:
        self._journal.close()

    def say(self, kind: EventKind, cohort: str, subject: str, **body: Any) -> None:
        self._journal.append(NewEvent(kind, cohort, subject, body))

    def start(self, cohort: str, nodes: tuple[str, ...], **body: Any) -> ReleaseManifest:
        genesis = make.make_release(cohort)
        self.say(EventKind.COHORT_CREATED, cohort, genesis.digest, **self._signed(genesis), **body)
        token = make.token_created(cohort, f"token-{cohort}")
        self.say(token.kind, cohort, token.subject, **token.body, by="anna")
        for node in nodes:
            body = dict(make.node_enrolled(node, cohort, token.subject).body)
            body["public_key_pem"] = _pem(self._nodes[node]).decode()
            self.say(EventKind.NODE_ENROLLED, cohort, node, **body)
        self.say(EventKind.TRAIN_OFFERED, cohort, f"train-{cohort}", max_rank=16)
        return genesis

    def admit(
        self, cohort: str, start: ReleaseManifest, node: str, sequence: int
    ) -> UpdateManifest:
        update = make.make_update(start, node, sequence)
        signature = sign(self._nodes[node], update.to_bytes())
        body = {"manifest": update.to_bytes().decode(), "signature": _text(signature)}
        self.say(EventKind.UPDATE_ADMITTED, cohort, update.digest, **body)
        return update

    def plan(self, parent: ReleaseManifest, *updates: UpdateManifest, **fields: Any) -> MergePlan:
        self._version += 1
        plan = make.make_plan(parent, *updates).model_copy(update={"seed": self._version, **fields})
        self._journal.append(make.planned(plan))
        return plan

    def build(self, plan: MergePlan, **body: Any) -> ReleaseManifest:
        candidate = make.make_candidate(plan)
        if plan.builds_on is not None:
            own = Payload(digest_sha256=make.digest_of("own"), size_bytes=10)
            composition = Composition(builds_on=plan.builds_on, own=own, own_truncation_error=0.1)
            candidate = candidate.model_copy(update={"composition": composition})
        signed = self._signed(candidate)
        body = {"plan_id": plan.digest, **signed, **body}
        self.say(EventKind.CANDIDATE_BUILT, plan.cohort, candidate.digest, **body)
        return candidate

    def decide(self, candidate: ReleaseManifest, accepted: bool, **body: Any) -> None:
        found = {"math": {"both": 80, "only_reference": 1, "only_candidate": 3, "neither": 16}}
        given = {"text": "as measured", "environments": found, "high_water": {}, **body}
        self.say(EventKind.VERDICT, candidate.cohort, candidate.digest, accepted=accepted, **given)

    def promote(self, release: ReleaseManifest, channel: str, **body: Any) -> None:
        said = {"channel": channel, "by": "gate", **body}
        self.say(EventKind.PROMOTED, release.cohort, release.digest, **said)

    def _signed(self, manifest: ReleaseManifest) -> dict[str, str]:
        data = manifest.to_bytes()
        return {"manifest": data.decode(), "signature": _text(sign(self._key, data))}


def record(central: Recorder) -> None:
    """The whole story."""
    shared = central.start(SHARED, ("a-1", "b-2", "c-3"))
    acme = central.start(ACME, ("d-4",), builds_on=SHARED)
    spare = dict(make.token_created(SHARED).body)
    central.say(EventKind.TOKEN_CREATED, SHARED, "spare", **spare, by="anna")
    central.say(EventKind.TOKEN_REVOKED, SHARED, "spare", reason="not needed", by="anna")
    old, first, other, third = (
        central.admit(SHARED, shared, node, number)
        for node, number in (("a-1", 1), ("a-1", 2), ("b-2", 1), ("c-3", 1))
    )
    central.say(EventKind.UPDATE_SUPERSEDED, SHARED, old.digest, by=first.digest)
    central.say(EventKind.UPDATE_SET_ASIDE, SHARED, third.digest, reason="clipped", by="anna")
    central.say(EventKind.UPDATE_REQUEUED, SHARED, third.digest, by="anna")
    central.say(EventKind.UPDATE_SET_ASIDE, SHARED, third.digest, reason="damaged", lost=True)
    one = _evaluated(central, shared, first, other, third)
    _canary(central, one)
    _isolation(central, one)
    _composition(central, acme, one)
    central.say(EventKind.NODE_QUARANTINED, SHARED, "b-2", reason="rejected often", by="anna")
    central.admit(SHARED, one, "b-2", 7)
    central.say(EventKind.NODE_RELEASED, SHARED, "b-2", by="anna")
    central.say(EventKind.NODE_REVOKED, SHARED, "c-3", by="anna")
    central.say(EventKind.TOKEN_CREATED, SHARED, "again", **{**spare, "readmits": "c-3"}, by="anna")
    _forgetting(central, shared, one, first, other)
    gone = {
        "digest": old.payload.digest_sha256,
        "size_bytes": old.payload.size_bytes,
        "reason": "superseded",
    }
    central.say(EventKind.BLOBS_COLLECTED, "", "collection-1", blobs=[gone], by="anna")
    central.say(EventKind.COLLECTION_FINISHED, "", "collection-1")
    more = {"digest": make.digest_of("nothing"), "size_bytes": 5, "reason": "not needed"}
    central.say(EventKind.BLOBS_COLLECTED, "", "collection-2", blobs=[more], by="anna")
    lost = {"sequence": 90, "hash": make.digest_of("lost"), "by": "anna"}
    central.say(EventKind.JOURNAL_LOSS_ACCEPTED, "", "", **lost)


def _evaluated(
    central: Recorder,
    shared: ReleaseManifest,
    first: UpdateManifest,
    other: UpdateManifest,
    third: UpdateManifest,
) -> ReleaseManifest:
    left_out = [LeftOut(update_id=third.digest, reason="far from the others")]
    plan = central.plan(shared, first, other, left_out=left_out, filter="distance")
    one = central.build(plan, server_state=make.digest_of("server state"))
    nodes = ["a-1", "b-2", "c-3"]
    asked = {"candidate": one.digest, "reference": shared.digest, "tasks": 10, "nodes": nodes}
    asked["deadline_at"] = "2026-11-22T13:00:00.000000Z"
    central.say(EventKind.EVALUATION_OFFERED, SHARED, "look-1", **asked)
    suites = {"math": {"first_task": 10, "tasks": 20}}
    so_far = {"math": {"both": 8, "only_reference": 0, "only_candidate": 1, "neither": 1}}
    central.say(
        EventKind.EVALUATION_OFFERED,
        SHARED,
        "look-2",
        **asked,
        look=2,
        references={"math": shared.digest},
        suites=suites,
        so_far=so_far,
        attempts=2,
        temperature=0.5,
    )
    result = {"environment": "math", "tasks": 10, "passed": 9}
    for offer in ("look-1", "look-2"):
        reported = {"node_id": "a-1", "results": [result], "abstain_reason": ""}
        central.say(EventKind.EVALUATION_REPORTED, SHARED, offer, **reported)
    abstained = {"node_id": "b-2", "results": [], "abstain_reason": "no tasks"}
    central.say(EventKind.EVALUATION_REPORTED, SHARED, "look-2", **abstained)
    central.say(EventKind.NODE_SILENT, SHARED, "b-2", offer_id="look-2")
    central.say(EventKind.NODE_SILENT, SHARED, "c-3", offer_id="look-2")
    central.decide(one, True, high_water={"math": one.digest})
    central.promote(one, "stable")
    late = {"node_id": "c-3", "results": [result], "abstain_reason": ""}
    central.say(EventKind.EVALUATION_REPORTED, SHARED, "look-2", **late)
    for release in (shared, one):
        central.say(EventKind.RELEASE_SERVED, SHARED, release.digest, node_id="a-1")
    return one


def _canary(central: Recorder, one: ReleaseManifest) -> None:
    update = central.admit(SHARED, one, "a-1", 3)
    canary = central.build(central.plan(one, update))
    central.decide(canary, True)
    central.promote(canary, "canary")
    reported = {"node_id": "b-2", "condition": "trouble", "problem": "answers are empty"}
    central.say(EventKind.CANARY_REPORTED, SHARED, canary.digest, **reported)
    central.say(
        EventKind.ROLLED_BACK,
        SHARED,
        one.digest,
        from_release=canary.digest,
        abandoned=[canary.digest],
        updates="requeue",
        by="anna",
        channel="canary",
    )
    again = central.build(central.plan(one, update))
    central.decide(again, True)
    central.promote(again, "canary")
    central.promote(again, "stable", ends=["canary"])
    central.say(
        EventKind.ROLLED_BACK,
        SHARED,
        one.digest,
        from_release=again.digest,
        abandoned=[again.digest],
        updates="set_aside",
        by="anna",
    )


def _isolation(central: Recorder, one: ReleaseManifest) -> None:
    nodes = ("a-1", "b-2", "c-3")
    updates = [central.admit(SHARED, one, node, 4) for node in nodes]
    central.decide(central.build(central.plan(one, *updates)), False, isolate=True)
    part = central.build(central.plan(one, *updates[:2]))
    central.decide(part, False, isolate=True)
    central.decide(central.build(central.plan(one, updates[0])), False)


def _composition(central: Recorder, acme: ReleaseManifest, one: ReleaseManifest) -> None:
    update = central.admit(ACME, acme, "d-4", 1)
    plan = central.plan(acme, update, builds_on=one.digest)
    composed = central.build(plan)
    central.decide(composed, True)
    central.promote(composed, "stable")
    waits = central.plan(composed, builds_on=one.digest, updates=[])
    central.decide(central.build(waits), False, text="no better")


def _forgetting(
    central: Recorder,
    shared: ReleaseManifest,
    one: ReleaseManifest,
    first: UpdateManifest,
    other: UpdateManifest,
) -> None:
    order = {"node_id": "", "accept_loss": False, "by": "anna"}
    central.say(EventKind.FORGET_ORDERED, SHARED, "order-1", updates=[other.digest], **order)
    central.say(EventKind.FORGET_FAILED, SHARED, "order-1", reason="taken back", by="anna")
    order["node_id"] = "a-1"
    central.say(EventKind.FORGET_ORDERED, SHARED, "order-2", updates=[first.digest], **order)
    payload = first.payload.digest_sha256
    taken = PlannedUpdate(update_id=first.digest, payload=payload, weight=0.5)
    removal = Removal(order="order-2", since=shared.digest, updates=[taken], merges=1)
    without = central.build(central.plan(one, removal=removal))
    central.decide(without, True, loss_accepted_by="anna")
    central.promote(without, "stable")


def _text(signature: bytes) -> str:
    return base64.b64encode(signature).decode()


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
