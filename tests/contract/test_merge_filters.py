"""Robust filters through the loop: what is judged, what is left out, what a crash leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from central.cli.release_texts import explanation
from central.cohort import screening
from central.cohort.planning import plan_merge
from central.fleet.presence import NodePresence
from central.fleet.revocation import revoke_node
from central.journal import EventKind, NewEvent
from central.merging import merge as product_merge
from central.operators.forgetting import order_forget
from central.operators.lineage import explain_release
from protos.fleet.v1 import fleet_pb2
from protos.lora import LoraModule, LoraTensors, encode
from protos.manifest import Payload, sha256_hex
from tests.contract.cohort_loop import (
    NAMES,
    Central,
    dense,
    make_increment,
    make_settings,
    opened,
    take_steps,
)
from tests.contract.merge_steps import all_identical, merge, plan_of, record
from tests.unit.central.builders import admitted, make_update


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        central.join("shared", *(f"{letter}-0" for letter in "abcdefgh"))
        yield central


def fleet(central: Central, outliers: int = 1) -> tuple[list[str], list[LoraTensors]]:
    """Six nodes that learnt mostly the same, and `outliers` that send ten times the opposite.

    Each has factors of its own.
    """
    shared, ids, updates = make_increment(100), [], []
    for number, letter in enumerate("abcdefgh"[: 6 + outliers]):
        rng, own = np.random.default_rng(number), make_increment(number, rank=1)
        sign = np.float32(1.0 if number < 6 else -10.0)
        modules = {}
        for name, module in shared.modules.items():
            turn = np.linalg.qr(rng.standard_normal((4, 4)))[0].astype(np.float32)
            a = np.concatenate([module.A, own.modules[name].A])
            b = np.concatenate([sign * module.B, np.float32(0.3) * own.modules[name].B], axis=1)
            modules[name] = LoraModule(turn @ a, b @ turn.T, module.scale)
        updates.append(LoraTensors(modules))
        ids.append(central.admit(f"{letter}-0", updates[-1]))
    return ids, updates


@pytest.mark.parametrize(
    ("name", "words"), [("near", "median distance"), ("multi-krum", "Krum score")]
)
@pytest.mark.parametrize("strategy", ["product-mean", "FedMedian"])
def test_what_a_filter_leaves_out_is_set_aside_with_its_score_and_can_come_back(
    central: Central, name: str, words: str, strategy: str
) -> None:
    ids, updates = fleet(central)
    settings = make_settings(strategy=strategy, filter=name, min_updates=7)
    release = merge(central, settings)
    plan = plan_of(central)
    assert release.updates == ids[:6]
    assert [(left.update_id, words in left.reason) for left in plan.left_out] == [(ids[6], True)]
    assert (record(central, ids[6]).state, record(central, ids[6]).reason) == (
        "set_aside",
        plan.left_out[0].reason,
    )
    assert name in plan.filter
    assert {update.weight for update in plan.updates} == {1 / 6}
    if strategy == "product-mean":
        expected = sum(dense(update, NAMES[0]) for update in updates[:6]) / 6
        u, s, vt = np.linalg.svd(expected)
        np.testing.assert_allclose(
            central.product(central.head(), NAMES[0]), (u[:, :8] * s[:8]) @ vt[:8], atol=1e-3
        )
    assert all_identical(central)
    central.journal.append(NewEvent(EventKind.UPDATE_REQUEUED, "shared", ids[6], {}))
    merge(central, make_settings(strategy=strategy, min_updates=1))
    assert record(central, ids[6]).state == "merged"


def test_explain_shows_what_a_filter_decided(central: Central) -> None:
    ids, _ = fleet(central)
    merge(central, make_settings(filter="near", min_updates=7))
    with central.journal.read() as state:
        answer = explain_release(
            state, central.head(), lambda node: NodePresence(False, "", fleet_pb2.NodeStatus())
        )
    assert answer.filter == "near, threshold 3.5, of 7 updates"
    assert [(left.update_id, left.node_id) for left in answer.left_out] == [(ids[6], "g-0")]
    assert "left out of a merge on" in answer.left_out[0].reason
    assert [part.factor for part in answer.contributions] == [1.0] * 6
    text = "\n".join(explanation(answer))
    assert "filter: near, threshold 3.5, of 7 updates; left out: 1\n" in text
    assert f"  {ids[6][:12]} from g-0: left out of a merge on" in text
    assert "clipped" not in text


@pytest.mark.parametrize("limit", [None, 2.0])
def test_clip_bounds_every_increment_by_the_median_or_a_limit(
    central: Central, limit: float | None
) -> None:
    ids, updates = fleet(central)
    release = merge(
        central, make_settings(filter="clip", filter_norm=limit, min_updates=7, rank=12)
    )
    norms = [np.sqrt(sum(np.sum(dense(update, name) ** 2) for name in NAMES)) for update in updates]
    bound = limit or np.median(norms)
    plan = plan_of(central)
    assert release.updates == ids
    for planned, norm in zip(plan.updates, norms, strict=True):
        assert planned.factor == pytest.approx(min(1.0, bound / norm), rel=1e-5)
    expected = (
        sum(
            min(1.0, bound / norm) * dense(u, NAMES[0])
            for u, norm in zip(updates, norms, strict=True)
        )
        / 7
    )
    np.testing.assert_allclose(central.product(central.head(), NAMES[0]), expected, atol=1e-3)
    assert f"norm {bound:.6g}" in plan.filter
    assert all_identical(central)


def test_multi_krum_waits_for_its_number_however_old_the_updates_are(central: Central) -> None:
    settings = make_settings(filter="multi-krum", min_updates=6, max_age_s=60)
    late = "2026-11-22T18:00:00.000000Z"
    for seed, letter in enumerate("abcd"):
        central.admit(f"{letter}-0", make_increment(seed))
    with central.journal.read() as state:
        assert plan_merge(state, "shared", settings.merge.policy("shared"), late) is None
        assert plan_merge(state, "shared", make_settings().merge.policy("shared"), late) is not None
    central.admit("e-0", make_increment(9))
    take_steps(central, settings, lambda: central.head().manifest.version == 1, clock=lambda: late)
    assert len(central.head().manifest.updates) == 4
    with pytest.raises(ValueError, match="needs at least 5 updates"):
        make_settings(filter="multi-krum")


def test_a_draft_is_dropped_when_the_state_moves_on_while_it_is_filtered(
    central: Central, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, _ = fleet(central, outliers=2)
    real, seen = screening.product_gram, []

    def slow(updates: object, **options: object) -> np.ndarray:
        seen.append(len(updates))  # type: ignore[arg-type]
        if len(seen) == 1:
            revoke_node(central.journal, "a-0", "operator")
        return real(updates, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(screening, "product_gram", slow)
    release = merge(central, make_settings(filter="near", min_updates=7))
    assert seen == [8, 7]
    assert release.updates == ids[1:6]
    assert "revoked" in record(central, ids[0]).reason
    assert {record(central, update).state for update in ids[6:]} == {"set_aside"}


def test_an_order_to_forget_that_comes_while_a_draft_is_filtered_goes_first(
    central: Central, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = central.admit("h-0", make_increment(50))
    merge(central, make_settings(min_updates=1))
    ids, _ = fleet(central)
    real, seen = screening.product_gram, []

    def slow(updates: object, **options: object) -> np.ndarray:
        seen.append(len(updates))  # type: ignore[arg-type]
        if len(seen) == 1:
            order_forget(central.journal, central.blobs, first, accept_loss=False, by="tests")
        return real(updates, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(screening, "product_gram", slow)
    settings = make_settings(filter="near", min_updates=7)
    take_steps(central, settings, lambda: central.head().manifest.version == 3)
    assert seen == [7, 7]
    with central.journal.read() as state:
        plans = [planned.plan for planned in state.plans.values()][1:]
    assert [(plan.removal is not None, len(plan.updates)) for plan in plans] == [
        (True, 0),
        (False, 6),
    ]
    assert record(central, first).state == "forgotten"
    assert record(central, ids[0]).state == "merged"


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_the_record_of_a_filtered_plan_ends_the_same(
    tmp_path: Path, after: bool
) -> None:
    settings, ends = make_settings(filter="near", min_updates=7), []
    for crash in (False, True):
        root = tmp_path / str(crash)
        root.mkdir()
        with opened(root) as central:
            central.join("shared", *(f"{letter}-0" for letter in "abcdefgh"))
            ids, _ = fleet(central)
            if crash:
                append = central.journal.append

                def crashing(*events: NewEvent, append: Any = append) -> Any:
                    if events[-1].kind is EventKind.MERGE_PLANNED:
                        if after:
                            append(*events)
                        raise Crash
                    return append(*events)

                central.journal.append = crashing  # type: ignore[method-assign]
                with pytest.raises(Crash):
                    merge(central, settings)
            else:
                merge(central, settings)
        with opened(root) as central:
            if central.head().manifest.version == 0:
                take_steps(
                    central, settings, lambda central=central: central.head().manifest.version == 1
                )
            states = [record(central, update).state for update in ids]
            places = [ids.index(left.update_id) for left in plan_of(central).left_out]
            ends.append((central.head().manifest.payload, states, places))
    assert ends[0] == ends[1]
    assert ends[0][1:] == (["merged"] * 6 + ["set_aside"], [6])


class Crash(Exception):
    """Stands for kill -9."""


def test_a_payload_that_cannot_be_judged_is_set_aside_and_the_others_are_filtered(
    central: Central,
) -> None:
    ids, _ = fleet(central)
    data = b"not a payload"
    update = make_update(
        central.head().manifest,
        "h-0",
        1,
        payload=Payload(digest_sha256=central.blobs.put(data), size_bytes=len(data)),
    )
    central.journal.append(admitted(update, "shared"))
    release = merge(central, make_settings(filter="near", min_updates=7))
    assert "cannot be merged" in record(central, update.digest).reason
    assert release.updates == ids[:6]


def test_the_exact_limit_is_the_plans_and_not_todays(central: Central) -> None:
    updates = [make_increment(seed) for seed in range(8)]
    for letter, update in zip("abcdefgh", updates, strict=True):
        central.admit(f"{letter}-0", update)
    merge(central, make_settings(rank=2, exact_rank=9, min_updates=8))
    plan = plan_of(central)
    assert plan.exact_rank == 9
    weighted = [(update, 1 / 8) for update in updates]
    exact = encode(product_merge(LoraTensors(), weighted, rank=2, server_step=1.0, seed=0).tensors)
    assert sha256_hex(exact) != central.head().manifest.payload.digest_sha256, (
        "a fold of 9 gives other bytes than one step"
    )
    assert all_identical(central)
