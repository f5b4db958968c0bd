"""A plan's canonical form: plans of earlier software keep their bytes and digests, and what came later is in the digest."""

from __future__ import annotations

import json

from central.journal import LeftOut, MergePlan, PlannedKernel, PlannedUpdate
from central.journal.plan import UNRECORDED_KERNEL

FIRST = {
    "base": "b" * 64,
    "cohort": "shared",
    "created_at": "2026-11-22T12:00:00.000000Z",
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
"""As the first central wrote it."""


def test_a_plan_of_the_first_central_keeps_its_bytes_and_digest() -> None:
    data = json.dumps(FIRST, sort_keys=True, separators=(",", ":")).encode()
    plan = MergePlan.from_bytes(data)
    assert plan.to_bytes() == data
    assert plan.digest == "d09d3f39315587ee82b0488182f18b7862e5dd487ca8dac111875a79ead64e7f"
    assert (plan.kernel, plan.blas_threads) == (None, None)
    assert PlannedKernel(streamed=True, exact_rank=512) == UNRECORDED_KERNEL, "this is what merged it"
    assert (plan.updates[0].factor, plan.left_out, plan.resolve, plan.solutions, plan.filter) == (
        1.0,
        [],
        False,
        [],
        "",
    )


def test_everything_that_came_later_is_read_back_and_in_the_digest() -> None:
    plan = MergePlan.model_validate(FIRST)
    changes: dict[str, object] = {
        "kernel": UNRECORDED_KERNEL,
        "blas_threads": 1,
        "filter": "clip, norm 1",
        "left_out": [LeftOut(update_id="e" * 64, reason="far")],
        "resolve": True,
        "solutions": [PlannedUpdate(update_id="f" * 64, payload="0" * 64, weight=0.5)],
        "updates": [PlannedUpdate(update_id="c" * 64, payload="d" * 64, weight=0.5, factor=0.25)],
    }
    digests = {plan.digest}
    for name, value in changes.items():
        changed = plan.model_copy(update={name: value})
        assert MergePlan.from_bytes(changed.to_bytes()) == changed
        digests.add(changed.digest)
    assert len(digests) == 1 + len(changes)
