"""A plan's canonical form: a recorded plan keeps its bytes and digest, and every field is in the
digest.
"""

from __future__ import annotations

import json

from central.journal import LeftOut, MergePlan, PlannedUpdate

RECORDED = {
    "base": "b" * 64,
    "blas_threads": 1,
    "cohort": "shared",
    "created_at": "2026-11-22T12:00:00.000000Z",
    "exact_rank": 512,
    "parent": "a" * 64,
    "rank": 32,
    "schema_version": 1,
    "seed": 0,
    "server_step": 1.0,
    "software": "lorikeet-central 0.1.0",
    "strategy": "product-mean",
    "strategy_options": {},
    "updates": [{"payload": "d" * 64, "update_id": "c" * 64, "weight": 0.5}],
    "version": 1,
}
"""As central 0.1.0 writes it."""


def test_a_recorded_plan_keeps_its_bytes_and_digest() -> None:
    data = json.dumps(RECORDED, sort_keys=True, separators=(",", ":")).encode()
    plan = MergePlan.from_bytes(data)
    assert plan.to_bytes() == data
    assert plan.digest == "dda3f54e80c88eeaadf76d76084f0a5e230062e9825860d66ee406fc8122c8b0"
    assert (plan.updates[0].factor, plan.left_out, plan.filter) == (1.0, [], "")


def test_every_field_is_read_back_and_in_the_digest() -> None:
    plan = MergePlan.model_validate(RECORDED)
    changes: dict[str, object] = {
        "exact_rank": 64,
        "filter": "clip, norm 1",
        "left_out": [LeftOut(update_id="e" * 64, reason="far")],
        "updates": [PlannedUpdate(update_id="c" * 64, payload="d" * 64, weight=0.5, factor=0.25)],
    }
    digests = {plan.digest}
    for name, value in changes.items():
        changed = plan.model_copy(update={name: value})
        assert MergePlan.from_bytes(changed.to_bytes()) == changed
        digests.add(changed.digest)
    assert len(digests) == 1 + len(changes)
