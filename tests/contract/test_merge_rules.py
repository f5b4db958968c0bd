"""Merge rules that an operator chooses, through the loop: RegMean, re-solving, robust filters, and the plan that says it all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import central.federation.grid as grid_module
from central.errors import Refused, SettingsError
from central.federation import screening
from central.federation.planning import plan_merge
from central.federation.replies import train_replies
from central.federation.server_app import run_cohort
from central.federation.strategy import terms_of
from central.federation.trial import check_strategy
from central.federation.verify import Finding, verify_releases
from central.fleet.presence import NodePresence
from central.fleet.revocation import revoke_node
from central.journal import EventKind, MergePlan, NewEvent, PlannedKernel, UpdateRecord
from central.journal.payloads import needed_blobs
from central.merging import merge as product_merge
from central.operator.forgetting import propose_forget
from central.operator.lineage import explain_release
from central.operator.texts import explanation
from central.settings import CentralSettings
from protos.fleet.v1 import fleet_pb2
from protos.lora import LoraModule, LoraTensors, decode, encode
from protos.manifest import Payload, ReleaseManifest, Start, sha256_hex
from protos.releases.v1 import releases_pb2
from tests.contract import central_harness as harness
from tests.contract.cohort_loop import (
    IN,
    KEY,
    NAMES,
    Central,
    dense,
    make_increment,
    make_settings,
    opened,
    take_steps,
)
from tests.unit.central.builders import admitted, make_update

EPS = 0.1


@pytest.fixture
def central(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Central]:
    monkeypatch.setattr(grid_module, "STOP_CHECK_S", 0.02)
    with opened(tmp_path) as central:
        central.join("shared", *(f"{letter}-0" for letter in "abcdefgh"))
        yield central


def make_sketched(seed: int, rank: int = 3) -> LoraTensors:
    rng = np.random.default_rng([seed, 9])
    sections = {
        f"gram/{name}": {
            "U": (3 * rng.standard_normal((IN, 2))).astype(np.float32),
            "c": np.asarray(rng.uniform(0.1, 1), np.float32),
        }
        for name in NAMES
    }
    return LoraTensors(make_increment(seed, rank).modules, sections)


def gram(update: LoraTensors, name: str, features: int = IN) -> np.ndarray:
    section = update.sections.get(f"gram/{name}")
    if section is None:
        return (1 + EPS) * np.eye(features)
    whole = float(section["c"]) * np.eye(features) + section["U"].astype(np.float64) @ section["U"].T
    return whole / np.mean(np.diag(whole)) + EPS * np.eye(features)


def solve(entries: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(sum W_i G_i) (sum G_i)^-1, dense."""
    return np.linalg.solve(sum(g for _, g in entries).T, sum(w @ g for w, g in entries).T).T


def admit_from(
    central: Central,
    node: str,
    tensors: LoraTensors,
    start: ReleaseManifest,
    prefix_rank: int | None = None,
    sequence: int = 9,
) -> str:
    data = encode(tensors)
    payload = Payload(digest_sha256=central.blobs.put(data), size_bytes=len(data))
    begin = Start(
        release=start.digest,
        payload=start.payload.digest_sha256,
        prefix_rank=start.rank if prefix_rank is None else prefix_rank,
        dtype="float32",
    )
    update = make_update(start, node, sequence, payload=payload).model_copy(update={"start": begin})
    central.journal.append(admitted(update, "shared"))
    return update.digest


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
        return list(verify_releases(state, list(state.releases.values()), central.blobs, key, deep=True))


def all_identical(central: Central) -> bool:
    return {finding.outcome for finding in verified(central)} == {"identical"}


def test_regmean_is_the_dense_solve_from_any_start_and_with_nodes_that_send_no_sketches(central: Central) -> None:
    settings = make_settings(strategy="regmean", rank=12, server_step=0.7)
    genesis = central.head().manifest
    first = [make_sketched(1), make_increment(2)]
    for node, update in zip(("a-0", "b-0"), first, strict=True):
        central.admit(node, update)
    merge(central, settings)
    with central.journal.read() as state:
        assert (state.train_offers["shared"].max_rank, state.train_offers["shared"].gram_rank) == (64, 16)
    expected = {name: 0.7 * solve([(dense(u, name), gram(u, name)) for u in first]) for name in NAMES}
    second = [make_sketched(3, rank=2), make_sketched(4)]
    admit_from(central, "c-0", second[0], genesis)
    central.admit("a-0", second[1], sequence=2)
    merge(central, settings)
    for name in NAMES:
        total = expected[name] + 0.7 * solve([(dense(u, name), gram(u, name)) for u in second])
        np.testing.assert_allclose(central.product(central.head(), name), total, atol=2e-4)
        mean = expected[name] + 0.35 * sum(dense(u, name) for u in second)
        assert np.abs(total - mean).max() > 0.1, "the product mean is another matrix"
    plan = plan_of(central)
    assert (plan.strategy, plan.kernel and plan.kernel.streamed) == ("regmean", False)
    assert all_identical(central)


def test_resolve_solves_over_the_latest_solution_of_every_node(central: Central) -> None:
    settings = make_settings(strategy="regmean", resolve=True, rank=12, min_updates=3)
    updates = {node: make_sketched(seed) for seed, node in enumerate(("a-0", "b-0", "c-0"))}
    for node, update in updates.items():
        central.admit(node, update)
    first = merge(central, settings)
    # a works on, from a prefix; b starts from version 0 again; c, d and e: nothing new, new, and revoked.
    newer, stale = make_sketched(10), make_sketched(11)
    parent = {name: central.product(central.head(), name) for name in NAMES}
    u, s, vt = {}, {}, {}
    for name in NAMES:
        u[name], s[name], vt[name] = np.linalg.svd(parent[name], full_matrices=False)
    merged = record(central, first.updates[2])
    admit_from(central, "a-0", newer, first, prefix_rank=2)
    with central.journal.read() as state:
        genesis = state.genesis("shared").manifest
    admit_from(central, "b-0", stale, genesis, sequence=10)
    merge(central, make_settings(strategy="regmean", resolve=True, rank=12, min_updates=2))
    plan = plan_of(central)
    assert [solution.update_id for solution in plan.solutions] == [merged.update_id]
    assert central.head().manifest.updates == [update.update_id for update in plan.updates], (
        "what is read again is not new"
    )
    assert record(central, merged.update_id).release_id == first.digest
    for name in NAMES:
        start = (u[name][:, :2] * s[name][:2]) @ vt[name][:2]
        entries = [
            (start + dense(newer, name), gram(newer, name)),
            (dense(stale, name), gram(stale, name)),
            (dense(updates["c-0"], name), gram(updates["c-0"], name)),
        ]
        np.testing.assert_allclose(central.product(central.head(), name), solve(entries), atol=2e-4)
    revoke_node(central.journal, "c-0", "operator")
    for sequence, node in enumerate(("a-0", "b-0"), start=20):
        central.admit(node, make_sketched(sequence), sequence=sequence)
    merge(central, make_settings(strategy="regmean", resolve=True, rank=12, min_updates=2, server_step=0.5))
    assert plan_of(central).solutions == []
    assert all_identical(central)
    with central.journal.read() as state:
        kept = needed_blobs(state)
    assert {planned.payload for planned in (*plan.updates, *plan.solutions)} <= kept
    assert {genesis.payload.digest_sha256, first.payload.digest_sha256} <= kept, "solutions are built on these"
    with pytest.raises(Refused, match="solved over absolute solutions"):
        propose_forget(central.journal, central.blobs, merged.update_id, None, False, "operator")


def test_a_cohort_that_builds_on_another_re_solves_over_its_own_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_module, "STOP_CHECK_S", 0.02)
    settings = make_settings(strategy="regmean", resolve=True, rank=12, min_updates=1)
    with opened(tmp_path, {"acme": "shared"}) as central:
        central.join("shared", "s-1")
        central.join("acme", "a-1", "a-2")
        steps = [("acme", "a-1", 1), ("shared", "s-1", 2), ("acme", "", 0), ("acme", "a-2", 3)]
        for version, (cohort, node, seed) in zip((1, 1, 2, 3), steps, strict=True):
            if node:
                central.admit(node, make_increment(seed), cohort, seed)
            take_steps(central, settings, lambda: central.head(cohort).manifest.version == version, cohort)  # noqa: B023
        head = central.head("acme").manifest
        own = decode(central.blobs.read(head.own_payload.digest_sha256))
        assert head.own_payload != head.payload
        for name in NAMES:
            one, three = (dense(make_increment(seed), name) for seed in (1, 3))
            # Solutions: one of a-1, and one + three of a-2; what shared learnt is in neither.
            np.testing.assert_allclose(dense(own, name), one + three / 2, atol=1e-4)
        assert all_identical(central)


def test_a_sketch_that_is_none_sets_its_update_aside_and_the_others_are_merged(central: Central) -> None:
    broken = make_sketched(1)
    sections = {**broken.sections, f"gram/{NAMES[0]}": {"U": np.ones((IN, 1), np.float32)}}
    central.admit("a-0", make_sketched(0))
    bad = central.admit("b-0", LoraTensors(broken.modules, sections))
    central.admit("c-0", make_sketched(2))
    merge(central, make_settings(strategy="regmean"))
    assert record(central, bad).state == "set_aside"
    assert "expected U and c" in record(central, bad).reason
    assert len(central.head().manifest.updates) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, "eps"),
        ({"sketch_rank": 300}, "sketch_rank"),
        ({"epsilon": 1}, "epsilon.*Expected eps and sketch_rank"),
    ],
)
def test_options_of_regmean_are_checked_at_start(options: dict[str, float], message: str) -> None:
    check_strategy("regmean", {"eps": 0.3}, 2)
    with pytest.raises(SettingsError, match=message):
        check_strategy("regmean", options, 2)


def fleet(central: Central, outliers: int = 1) -> tuple[list[str], list[LoraTensors]]:
    """Six nodes that learnt mostly the same, and `outliers` that send ten times the opposite; all in factors of their own."""
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


@pytest.mark.parametrize(("name", "words"), [("near", "median distance"), ("multi-krum", "Krum score")])
@pytest.mark.parametrize("strategy", ["product-mean", "regmean", "FedMedian"])
def test_what_a_filter_leaves_out_is_set_aside_with_its_score_and_can_come_back(
    central: Central, name: str, words: str, strategy: str
) -> None:
    ids, updates = fleet(central)
    settings = make_settings(strategy=strategy, filter=name, min_updates=7)
    release = merge(central, settings)
    plan = plan_of(central)
    assert release.updates == ids[:6]
    assert [(left.update_id, words in left.reason) for left in plan.left_out] == [(ids[6], True)]
    assert (record(central, ids[6]).state, record(central, ids[6]).reason) == ("set_aside", plan.left_out[0].reason)
    assert name in plan.filter
    assert {update.weight for update in plan.updates} == {1 / 6}
    if strategy == "product-mean":
        expected = sum(dense(update, NAMES[0]) for update in updates[:6]) / 6
        u, s, vt = np.linalg.svd(expected)
        np.testing.assert_allclose(central.product(central.head(), NAMES[0]), (u[:, :8] * s[:8]) @ vt[:8], atol=1e-3)
    assert all_identical(central)
    central.journal.append(NewEvent(EventKind.UPDATE_REQUEUED, "shared", ids[6], {}))
    merge(central, make_settings(strategy=strategy, min_updates=1))
    assert record(central, ids[6]).state == "merged"


def test_the_kernel_is_the_plans_and_not_todays(central: Central) -> None:
    updates = [make_increment(seed) for seed in range(8)]
    for letter, update in zip("abcdefgh", updates, strict=True):
        central.admit(f"{letter}-0", update)
    merge(central, make_settings(rank=2, exact_rank=9, min_updates=8))
    plan = plan_of(central)
    assert plan.kernel == PlannedKernel(streamed=True, exact_rank=9)
    weighted = [(update, 1 / 8) for update in updates]
    exact = encode(product_merge(LoraTensors(), weighted, rank=2, server_step=1.0, seed=0).tensors)
    assert sha256_hex(exact) != central.head().manifest.payload.digest_sha256, (
        "a fold of 9 gives other bytes than one step"
    )
    assert all_identical(central)
    with central.journal.read() as state:
        old = replace(state.plans[plan.digest], plan=plan.model_copy(update={"kernel": None}))
        terms = terms_of(train_replies(state, old))
    assert (terms.streamed, terms.exact_rank) == (True, 512), "what merged the plans that do not say"


def test_explain_shows_what_a_filter_decided(central: Central) -> None:
    ids, _ = fleet(central)
    merge(central, make_settings(filter="near", min_updates=7))
    with central.journal.read() as state:
        answer = explain_release(state, central.head(), lambda node: NodePresence(False, "", fleet_pb2.NodeStatus()))
    assert answer.filter == "near, threshold 3.5, of 7 updates"
    assert [(left.update_id, left.node_id) for left in answer.left_out] == [(ids[6], "g-0")]
    assert "left out of a merge on" in answer.left_out[0].reason
    assert [part.factor for part in answer.contributions] == [1.0] * 6
    text = "\n".join(explanation(answer))
    assert "filter: near, threshold 3.5, of 7 updates; left out: 1\n" in text
    assert f"  {ids[6][:12]} from g-0: left out of a merge on" in text
    assert "clipped" not in text


@pytest.mark.parametrize("limit", [None, 2.0])
def test_clip_bounds_every_increment_by_the_median_or_a_limit(central: Central, limit: float | None) -> None:
    ids, updates = fleet(central)
    release = merge(central, make_settings(filter="clip", filter_norm=limit, min_updates=7, rank=12))
    norms = [np.sqrt(sum(np.sum(dense(update, name) ** 2) for name in NAMES)) for update in updates]
    bound = limit or np.median(norms)
    plan = plan_of(central)
    assert release.updates == ids
    for planned, norm in zip(plan.updates, norms, strict=True):
        assert planned.factor == pytest.approx(min(1.0, bound / norm), rel=1e-5)
    expected = sum(min(1.0, bound / norm) * dense(u, NAMES[0]) for u, norm in zip(updates, norms, strict=True)) / 7
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


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_the_record_of_a_filtered_plan_ends_the_same(
    tmp_path: Path, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_module, "STOP_CHECK_S", 0.02)
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
                take_steps(central, settings, lambda central=central: central.head().manifest.version == 1)
            states = [record(central, update).state for update in ids]
            places = [ids.index(left.update_id) for left in plan_of(central).left_out]
            ends.append((central.head().manifest.payload, states, places))
    assert ends[0] == ends[1]
    assert ends[0][1:] == (["merged"] * 6 + ["set_aside"], [6])


class Crash(Exception):
    """Stands for kill -9."""


def test_a_payload_that_cannot_be_judged_is_set_aside_and_the_others_are_filtered(central: Central) -> None:
    ids, _ = fleet(central)
    data = b"not a payload"
    update = make_update(
        central.head().manifest, "h-0", 1, payload=Payload(digest_sha256=central.blobs.put(data), size_bytes=len(data))
    )
    central.journal.append(admitted(update, "shared"))
    release = merge(central, make_settings(filter="near", min_updates=7))
    assert "cannot be merged" in record(central, update.digest).reason
    assert release.updates == ids[:6]


async def test_over_the_wire_central_asks_for_sketches_admits_them_and_merges_by_them(tmp_path: Path) -> None:
    merge = {"strategy": "regmean", "strategy_options": {"sketch_rank": 3}, "min_updates": 2, "rank": 8}
    settings = harness.make_settings(tmp_path, merge=merge, gate={"quorum": 0})
    stop, updates = threading.Event(), []
    async with harness.running_central(settings) as running:
        rooms, token = running.rooms, await running.token()
        arguments = ("shared", rooms.journal, rooms.registry, rooms.blobs, settings, stop)
        loop = asyncio.create_task(asyncio.to_thread(run_cohort, *arguments))
        for seed, name in enumerate(("a", "b")):
            node = await running.enroll(name, token)
            watch = node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20)
            events = aiter(watch)
            while not (event := await anext(events)).HasField("train"):
                pass
            assert event.train.gram_rank == 3
            watch.cancel()
            factors, rng = harness.make_factors(seed), np.random.default_rng(seed)
            sections = {
                f"gram/{module}": {
                    "U": rng.standard_normal((shape[1], 3)).astype(np.float32),
                    "c": np.asarray(0.1, np.float32),
                }
                for module, shape in harness.SHAPES.items()
            }
            updates.append(LoraTensors(factors.modules, sections))
            payload = encode(updates[-1])
            await node.upload(payload, node.manifest(payload, sections=sorted(sections)))
        try:
            async with asyncio.timeout(20):
                while (head := (await node.releases.GetHead(stable(), timeout=20)).head) == node.answer.genesis:
                    await asyncio.sleep(0.05)
        finally:
            stop.set()
            await loop
        release = ReleaseManifest.from_bytes(head.manifest)
        released = decode(rooms.blobs.read(release.payload.digest_sha256))
    for module, shape in harness.SHAPES.items():
        entries = [(product(u, module), gram(u, module, shape[1])) for u in updates]
        np.testing.assert_allclose(product(released, module), solve(entries), atol=2e-4)


def stable() -> releases_pb2.GetHeadRequest:
    return releases_pb2.GetHeadRequest(channel="stable")


def product(tensors: LoraTensors, name: str) -> np.ndarray:
    module = tensors.modules[name]
    return module.scale * (module.B.astype(np.float64) @ module.A.astype(np.float64))
