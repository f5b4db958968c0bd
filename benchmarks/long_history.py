"""A journal of any length for benchmarks: merges, evaluations, promotions, one like the other.

In: how many updates. Out: the whole chain of events. Guarantee: the same numbers and seed give the
same events.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from central.journal import (
    Event,
    EventKind,
    MergePlan,
    NewEvent,
    PlannedUpdate,
)
from central.journal.events import FIRST_HASH, chain
from protos.manifest import Payload, ReleaseManifest, Start, UpdateManifest, sha256_hex

NODES, PER_MERGE, REPORTS, SERVED = 200, 10, 3, 5
AT = "2026-11-22T12:00:00.000000Z"
BASE = sha256_hex(b"base")
SHARED, TRYING = "shared", "trying"
FINDING: dict[str, Any] = {
    "anchor": False,
    "nodes": REPORTS,
    "fall_points": -2.0,
    "tolerance_points": 1.0,
    "p_reference": 0.9,
    "p_fine": 0.01,
    "standing": "fine",
    "better": False,
    "fallback_reason": "",
    "attempts": 1,
    "total": 100,
}
"""What a verdict says of an environment beside its counts and reference."""
COUNTS = {"both": 80, "only_reference": 1, "only_candidate": 3, "neither": 16}


class History:
    """The events of one journal, in order."""

    def __init__(self, updates: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._updates = updates
        self._sequence, self._hash = 0, FIRST_HASH
        self.heads: dict[str, ReleaseManifest] = {}

    def events(self) -> Iterator[Event]:
        """The whole chain."""
        for cohort, nodes in ((SHARED, range(NODES)), (TRYING, range(NODES, NODES + REPORTS))):
            yield from map(self._chained, self._started(cohort, nodes))
        for first in range(0, self._updates, PER_MERGE):
            yield from map(self._chained, self._merged(SHARED, first))
        yield from map(self._chained, self._merged(TRYING, self._updates, decide=False))

    def _chained(self, new: NewEvent) -> Event:
        event = chain(new, self._sequence + 1, AT, self._hash)
        self._sequence, self._hash = event.sequence, event.hash
        return event

    def _started(self, cohort: str, nodes: range) -> Iterator[NewEvent]:
        genesis = release_of(cohort, 0)
        self.heads[cohort] = genesis
        yield NewEvent(EventKind.COHORT_CREATED, cohort, genesis.digest, signed(genesis.to_bytes()))
        token = {
            "secret_sha256": BASE,
            "uses": len(nodes),
            "expires_at": "2999-01-01T00:00:00Z",
            "by": "benchmark",
        }
        yield NewEvent(EventKind.TOKEN_CREATED, cohort, f"token-{cohort}", token)
        for number in nodes:
            body = {
                "name": f"node{number}",
                "token_id": f"token-{cohort}",
                "public_key_pem": "x" * 178,
                "base": BASE,
                "certificate_sha256": BASE,
            }
            yield NewEvent(EventKind.NODE_ENROLLED, cohort, node_id(number), body)

    def _merged(self, cohort: str, first: int, decide: bool = True) -> Iterator[NewEvent]:
        """Updates from the cohort's head, their merge, its evaluation; a release with `decide`."""
        parent = self.heads[cohort]
        nodes = (
            self._random.sample(range(NODES), PER_MERGE)
            if decide
            else list(range(NODES, NODES + REPORTS))
        )
        updates = [update_of(parent, number, first + i + 1) for i, number in enumerate(nodes)]
        for update in updates:
            yield admitted(update, cohort)
        plan = MergePlan(
            cohort=cohort,
            parent=parent.digest,
            version=parent.version + 1,
            base=BASE,
            updates=[
                PlannedUpdate(
                    update_id=u.digest, payload=u.payload.digest_sha256, weight=1 / len(updates)
                )
                for u in updates
            ],
            strategy="product-mean",
            rank=32,
            server_step=1.0,
            seed=0,
            exact_rank=512,
            software="benchmark",
            created_at=AT,
        )
        yield NewEvent(
            EventKind.MERGE_PLANNED, cohort, plan.digest, {"plan": plan.to_bytes().decode()}
        )
        candidate = release_of(
            cohort,
            plan.version,
            parent.digest,
            plan.digest,
            [planned.update_id for planned in plan.updates],
        )
        body = {"plan_id": plan.digest, **signed(candidate.to_bytes())}
        yield NewEvent(EventKind.CANDIDATE_BUILT, cohort, candidate.digest, body)
        asked = [node_id(number) for number in nodes[:REPORTS]]
        offer = {
            "candidate": candidate.digest,
            "reference": parent.digest,
            "tasks": 100,
            "deadline_at": AT,
            "nodes": asked,
        }
        offer_id = f"{cohort}-{plan.version}"
        yield NewEvent(EventKind.EVALUATION_OFFERED, cohort, offer_id, offer)
        results = [
            {"environment": "work", **{f"{key}_passed": value for key, value in COUNTS.items()}}
        ]
        for node in asked:
            report = {"node_id": node, "results": results, "abstain_reason": ""}
            yield NewEvent(EventKind.EVALUATION_REPORTED, cohort, offer_id, report)
        if decide:
            environments = {"work": {**FINDING, **COUNTS, "reference": parent.digest}}
            verdict = {
                "accepted": True,
                "text": "accepted",
                "environments": environments,
                "high_water": {},
            }
            yield NewEvent(EventKind.VERDICT, cohort, candidate.digest, verdict)
            yield NewEvent(
                EventKind.PROMOTED, cohort, candidate.digest, {"channel": "stable", "by": "gate"}
            )
            for number in self._random.sample(range(NODES), SERVED):
                yield NewEvent(
                    EventKind.RELEASE_SERVED, cohort, candidate.digest, {"node_id": node_id(number)}
                )
            self.heads[cohort] = candidate


def node_id(number: int) -> str:
    return f"node{number}-{number:08x}"


def release_of(
    cohort: str,
    version: int,
    parent: str | None = None,
    plan: str | None = None,
    updates: list[str] | None = None,
) -> ReleaseManifest:
    """A release whose payload is nowhere."""
    return ReleaseManifest(
        base=BASE,
        cohort=cohort,
        version=version,
        parent=parent,
        plan=plan,
        payload=Payload(
            digest_sha256=sha256_hex(f"{cohort} {version}".encode()), size_bytes=1_000_000
        ),
        rank=32 if version else 0,
        truncation_error=0.01,
        updates=updates or [],
        created_at=AT,
    )


def update_of(start: ReleaseManifest, number: int, sequence: int) -> UpdateManifest:
    """An update whose payload is nowhere."""
    return UpdateManifest(
        node_id=node_id(number),
        sequence=sequence,
        base=BASE,
        start=Start(
            release=start.digest,
            payload=start.payload.digest_sha256,
            prefix_rank=start.rank,
            dtype="bfloat16",
        ),
        rank=16,
        payload=Payload(
            digest_sha256=sha256_hex(f"{number} {sequence}".encode()), size_bytes=1_000_000
        ),
        round_id=f"round-{sequence}",
        experiences=64,
        metrics={"loss": 0.5, "pass_rate": 0.75},
        created_at=AT,
        software="benchmark",
    )


def admitted(update: UpdateManifest, cohort: str) -> NewEvent:
    return NewEvent(EventKind.UPDATE_ADMITTED, cohort, update.digest, signed(update.to_bytes()))


def signed(document: bytes) -> dict[str, str]:
    """As central keeps a signed document; the signature's length is that of a real one."""
    return {"manifest": document.decode(), "signature": "M" * 96}
