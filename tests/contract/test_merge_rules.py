"""Merge rules that an operator chooses, through the loop: RegMean, re-solving, and the plan that says it all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from central.errors import Refused, SettingsError
from central.federation.replies import train_replies
from central.federation.server_app import run_cohort
from central.federation.strategy import terms_of
from central.federation.trial import check_strategy
from central.fleet.revocation import revoke_node
from central.journal import PlannedKernel
from central.journal.payloads import needed_blobs
from central.merging import merge as product_merge
from central.operator.forgetting import order_forget, propose_forget
from protos.fleet.v1 import fleet_pb2
from protos.lora import LoraTensors, decode, encode
from protos.manifest import Payload, ReleaseManifest, Start, sha256_hex
from protos.releases.v1 import releases_pb2
from tests.contract import central_harness as harness
from tests.contract.cohort_loop import (
    IN,
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

EPS = 0.1


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
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


def test_what_was_forgotten_does_not_come_back_with_the_start_of_a_solution(central: Central) -> None:
    plain = make_settings(strategy="regmean", rank=12)
    central.admit("a-0", make_increment(1))
    kept = central.admit("b-0", make_increment(2))
    held = merge(central, plain)
    order_forget(central.journal, central.blobs, "a-0", None, False, "operator")
    clean = merge(central, plain)
    resolving = make_settings(strategy="regmean", resolve=True, rank=12, min_updates=1)
    admit_from(central, "c-0", make_increment(3), held)
    merge(central, resolving)
    assert not plan_of(central).resolve, "its start holds what was forgotten; its increment does not"
    for name in NAMES:
        expected = dense(decode(central.blobs.read(clean.payload.digest_sha256)), name) + dense(make_increment(3), name)
        np.testing.assert_allclose(central.product(central.head(), name), expected, atol=2e-4)
    central.admit("d-0", make_increment(4))
    merge(central, resolving)
    assert plan_of(central).resolve
    assert [solution.update_id for solution in plan_of(central).solutions] == [kept]


def test_a_cohort_that_builds_on_another_re_solves_over_its_own_products(tmp_path: Path) -> None:
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
