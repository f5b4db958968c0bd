"""Flower's ServerApp, Strategy and Grid on a real journal with real blobs: ours and stock FedAvg, crashes, cohorts."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from central.federation import JournalGrid, run_cohort
from central.federation.errors import FederationError
from central.federation.replies import flower_id
from central.federation.server_app import CohortLoop
from central.fleet.revocation import revoke_node
from central.journal import Event, EventKind, NewEvent
from central.settings import CentralSettings
from protos.lora import LoraModule, LoraTensors
from tests.contract.cohort_loop import (
    IN,
    NAMES,
    OUT,
    Central,
    answering,
    dense,
    make_increment,
    make_settings,
    opened,
    result,
    take_steps,
)
from tests.unit.central.builders import AT


class Crash(Exception):
    """Stands for kill -9: nothing after it runs, the journal is opened again."""


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        yield central


def test_product_mean_merges_in_product_space_release_after_release(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    increments = [make_increment(1), make_increment(2, rank=5, scale=0.5, names=NAMES[:1])]
    ids = [central.admit(node, tensors) for node, tensors in zip(("a-1", "b-2"), increments, strict=True)]
    settings = make_settings(server_step=1.5, rank=10)
    take_steps(central, settings, lambda: central.head().manifest.version == 1)
    first = central.head()
    assert first.manifest.updates == ids
    for name in NAMES:
        expected = 1.5 * sum(0.5 * dense(tensors, name) for tensors in increments)
        np.testing.assert_allclose(central.product(first, name), expected, atol=1e-4)
    more = [make_increment(3, rank=1), make_increment(4, rank=1)]
    for node, tensors in zip(("a-1", "b-2"), more, strict=True):
        central.admit(node, tensors, sequence=2)
    take_steps(central, settings, lambda: central.head().manifest.version == 2)
    for name in NAMES:
        expected = central.product(first, name) + 0.75 * sum(dense(tensors, name) for tensors in more)
        np.testing.assert_allclose(central.product(central.head(), name), expected, atol=1e-4)
    with central.journal.read() as state:
        assert {update.state for update in state.updates.values()} == {"merged"}
        assert len(state.train_offers) == 1
    assert central.head().manifest.parent == first.release_id
    assert central.head().manifest.truncation_error < 1e-5


def test_fedavg_averages_padded_factors_and_is_added_in_product_space(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    wide, narrow = make_increment(1, rank=4, scale=0.5), make_increment(2, rank=2, names=NAMES[:1])
    central.admit("a-1", wide)
    central.admit("b-2", narrow)
    settings = make_settings(strategy="FedAvg")
    take_steps(central, settings, lambda: central.head().manifest.version == 1)

    def padded(tensors: LoraTensors, name: str) -> tuple[np.ndarray, np.ndarray]:
        A, B = np.zeros((4, IN)), np.zeros((OUT, 4))
        if name in tensors.modules:
            module = tensors.modules[name]
            A[: module.rank], B[:, : module.rank] = module.A, module.scale * module.B
        return A, B

    for name in NAMES:
        (A1, B1), (A2, B2) = padded(wide, name), padded(narrow, name)
        np.testing.assert_allclose(central.product(central.head(), name), (B1 + B2) / 2 @ (A1 + A2) / 2, atol=1e-4)
    before = central.product(central.head(), NAMES[0])
    third = make_increment(3, rank=2)
    central.admit("a-1", third, sequence=2)
    central.admit("b-2", third, sequence=2)
    take_steps(central, settings, lambda: central.head().manifest.version == 2)
    np.testing.assert_allclose(central.product(central.head(), NAMES[0]), before + dense(third, NAMES[0]), atol=1e-4)


@pytest.mark.parametrize("strategy", ["product-mean", "FedAvg"])
def test_a_crash_at_any_append_leads_to_the_same_candidate(strategy: str, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    with opened(origin) as central:
        central.join("shared", "a-1", "b-2")
        for number, node in enumerate(("a-1", "b-2")):
            central.admit(node, make_increment(number))
    settings = make_settings(quorum=1, strategy=strategy)
    heads, crashes = set(), 0
    for point in range(12):
        root = tmp_path / str(point)
        shutil.copytree(origin, root)
        if _run_until_released(root, settings, crash_at=point):
            crashes += 1
            assert not _run_until_released(root, settings, crash_at=None)
        with opened(root) as central, central.journal.read() as state:
            heads.add((central.head().release_id, central.head().manifest.payload.digest_sha256))
            assert {update.state for update in state.updates.values()} == {"merged"}
            assert len(state.plans) == 1
            assert central.journal.verify() == state.sequence
    # Four appends (offer, plan, candidate, evaluation offer) and the verdict, each with a crash before and after it.
    assert crashes == 10
    assert len(heads) == 1


def _run_until_released(root: Path, settings: CentralSettings, crash_at: int | None) -> bool:
    """True when it crashed: at append crash_at // 2 of the loop, before it (even) or after it (odd)."""
    with opened(root) as central, answering(central.journal, lambda node: ([result("acme-a")], "")):
        append, loop_thread, count = central.journal.append, threading.current_thread(), 0

        def crashing(*events: NewEvent) -> list[object]:
            nonlocal count
            if threading.current_thread() is not loop_thread:
                return append(*events)  # type: ignore[return-value]
            count += 1
            if crash_at == 2 * (count - 1):
                raise Crash
            recorded = append(*events)
            if crash_at == 2 * (count - 1) + 1:
                raise Crash
            return recorded  # type: ignore[return-value]

        central.journal.append = crashing  # type: ignore[method-assign, assignment]
        try:
            take_steps(central, settings, lambda: central.head().manifest.version == 1)
        except Crash:
            return True
        return False


def test_a_plan_keeps_its_terms_when_settings_change(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    for number, node in enumerate(("a-1", "b-2")):
        central.admit(node, make_increment(number))
    grid = JournalGrid("shared", central.journal, make_settings(), threading.Event(), clock=lambda: AT)
    loop = CohortLoop("shared", central.journal, central.registry, central.blobs, make_settings())
    loop._build = lambda *_: None  # type: ignore[method-assign]
    loop.step(grid)
    changed = make_settings(strategy="FedAvg", rank=1, server_step=9)
    take_steps(central, changed, lambda: central.head().manifest.version == 1)
    expected = sum(0.5 * dense(make_increment(number), NAMES[0]) for number in range(2))
    np.testing.assert_allclose(central.product(central.head(), NAMES[0]), expected, atol=1e-4)


def test_verdict_and_promotion_are_recorded_with_the_counts(central: Central) -> None:
    central.join("shared", "a-1", "b-2", "c-3")
    for number, node in enumerate(("a-1", "b-2")):
        central.admit(node, make_increment(number))
    answers = {
        "a-1": ([result("acme-a")], ""),
        "b-2": ([], "vLLM is restarting"),
        "c-3": ([result("acme-c", c=0, neither=10)], ""),
    }
    with answering(central.journal, answers.get):
        take_steps(central, make_settings(quorum=2), lambda: central.head().manifest.version == 1)
    verdict = central.head().verdict
    assert verdict is not None
    assert verdict.accepted
    assert set(verdict.environments) == {"acme-a", "acme-c"}
    assert verdict.environments["acme-a"]["only_candidate"] == 5
    kinds = [event.kind for event in central.journal.events()]
    assert kinds[-2:] == [EventKind.VERDICT, EventKind.PROMOTED]
    assert kinds.count(EventKind.EVALUATION_OFFERED) == 1


def test_a_fall_is_rejected_and_its_updates_are_set_aside(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    for number, node in enumerate(("a-1", "b-2")):
        central.admit(node, make_increment(number))
    with answering(central.journal, lambda node: ([result("acme-a", both=2, b=14, c=0, neither=4)], "")):
        take_steps(central, make_settings(quorum=1), lambda: _states(central) == {"set_aside"})
    assert central.head().manifest.version == 0
    with central.journal.read() as state:
        assert all("acme-a fell" in update.reason for update in state.updates.values())


def test_a_silent_node_holds_up_nothing_and_too_few_results_are_asked_again(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    for number, node in enumerate(("a-1", "b-2")):
        central.admit(node, make_increment(number))
    minute = 0

    def clock() -> str:  # every look at the clock is a second later
        nonlocal minute
        minute += 1
        return f"2026-11-22T{12 + minute // 3600:02}:{minute // 60 % 60:02}:{minute % 60:02}.000000Z"

    def offers() -> list[Event]:
        return [event for event in central.journal.events() if event.kind == EventKind.EVALUATION_OFFERED]

    with answering(
        central.journal, lambda node: ([result("acme-a")], "") if node == "a-1" and len(offers()) > 1 else None
    ):
        take_steps(central, make_settings(quorum=1), lambda: central.head().manifest.version == 1, clock=clock)
    assert len(offers()) == 2
    assert central.head().verdict.environments["acme-a"]["nodes"] == 1  # type: ignore[union-attr]


def test_a_node_that_is_away_is_waited_for_only_the_grace(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    for number, node in enumerate(("a-1", "b-2")):
        central.admit(node, make_increment(number))
    second = 0

    def clock() -> str:
        nonlocal second
        second += 1
        return f"2026-11-22T12:{second // 60:02}:{second % 60:02}.000000Z"

    settings = make_settings(quorum=1)
    with answering(central.journal, lambda node: ([result("acme-a")], "") if node == "a-1" else None):
        take_steps(
            central,
            settings.model_copy(update={"gate": settings.gate.model_copy(update={"deadline_s": 3000})}),
            lambda: central.head().manifest.version == 1,
            clock=clock,
            is_connected=lambda node: node == "a-1",
        )
    assert 30 <= second < 300, "after the grace, long before the deadline"


def test_a_revoked_node_is_not_waited_for(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    for number, node in enumerate(("a-1", "b-2")):
        central.admit(node, make_increment(number))

    def answer(node: str) -> tuple[list[dict[str, object]], str] | None:
        return ([result("acme-a")], "") if node == "a-1" else None

    unsubscribe = central.journal.add_listener(
        lambda event: revoke.set() if event.kind == EventKind.EVALUATION_REPORTED else None
    )
    revoke = threading.Event()

    def operator() -> None:
        assert revoke.wait(20)
        central.journal.append(NewEvent(EventKind.NODE_REVOKED, "shared", "b-2", {}))

    thread = threading.Thread(target=operator)
    thread.start()
    with answering(central.journal, answer):
        take_steps(central, make_settings(quorum=1), lambda: central.head().manifest.version == 1)
    thread.join()
    unsubscribe()
    assert central.head().manifest.version == 1


def test_a_node_revoked_during_evaluation_is_left_out_of_the_release(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    kept, _ = [central.admit(node, make_increment(number)) for number, node in enumerate(("a-1", "b-2"))]
    settings = make_settings(quorum=1, min_updates=1)
    asked: list[str] = []

    def answer(node: str) -> tuple[list[dict[str, object]], str]:
        asked.append(node)
        if len(asked) == 1:
            revoke_node(central.journal, "b-2", "operator")
        return [result("acme-a")], ""

    with answering(central.journal, answer):
        take_steps(central, settings, lambda: central.head().manifest.version == 1)
    assert central.head().manifest.updates == [kept]
    with central.journal.read() as state:
        assert sorted(update.state for update in state.updates.values()) == ["merged", "set_aside"]


def test_a_rollback_during_evaluation_cancels_and_requeues(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    for sequence in (1, 2):
        for number, node in enumerate(("a-1", "b-2")):
            central.admit(node, make_increment(10 * sequence + number), sequence=sequence)
        if sequence == 1:
            take_steps(central, make_settings(), lambda: central.head().manifest.version == 1)
    waiting = [update.update_id for update in _waiting(central)]

    def roll_back_once(node: str) -> None:
        if central.head().manifest.version == 1:
            central.registry.rollback("shared", None, "requeue", "operator")

    take_steps(central, make_settings(quorum=1), lambda: len(_candidates(central)) == 2)
    with answering(central.journal, roll_back_once):
        grid = JournalGrid("shared", central.journal, make_settings(quorum=1), threading.Event(), clock=lambda: AT)
        CohortLoop("shared", central.journal, central.registry, central.blobs, make_settings(quorum=1)).step(grid)
    assert central.head().manifest.version == 0
    assert {update.update_id for update in _waiting(central)} >= set(waiting)
    take_steps(central, make_settings(), lambda: central.head().manifest.version == 1)
    assert len(central.head().manifest.updates) == 4


def test_an_unusable_update_is_set_aside_and_the_others_go_on(central: Central) -> None:
    central.join("shared", "a-1", "b-2", "c-3")
    central.admit("a-1", make_increment(1))
    odd = LoraTensors({NAMES[0]: LoraModule(np.ones((2, IN + 1), np.float32), np.ones((OUT, 2), np.float32))})
    bad = central.admit("b-2", odd)
    central.admit("c-3", make_increment(2))
    take_steps(central, make_settings(), lambda: central.head().manifest.version == 1)
    assert len(central.head().manifest.updates) == 2
    with central.journal.read() as state:
        assert state.updates[bad].state == "set_aside"
        assert "layers.0.q" in state.updates[bad].reason


def test_cohorts_never_mix(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    central.join("zeta", "d-4")
    shared = [central.admit(node, make_increment(n)) for n, node in enumerate(("a-1", "b-2"))]
    zeta = central.admit("d-4", make_increment(9), cohort="zeta")
    settings = make_settings(cohorts={"zeta": {"min_updates": 1}})
    stop = threading.Event()
    threads = [
        threading.Thread(target=run_cohort, args=(c, central.journal, central.registry, central.blobs, settings, stop))
        for c in ("shared", "zeta")
    ]
    for thread in threads:
        thread.start()
    try:
        done = central.journal.wait(
            lambda state: all(state.head(c).manifest.version == 1 for c in ("shared", "zeta")), timeout_s=30
        )
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=10)
    assert done
    assert not any(thread.is_alive() for thread in threads)
    assert central.head("shared").manifest.updates == shared
    assert central.head("zeta").manifest.updates == [zeta]
    np.testing.assert_allclose(
        central.product(central.head("zeta"), NAMES[0]), dense(make_increment(9), NAMES[0]), atol=1e-4
    )


def test_a_grid_sees_one_cohort(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    central.join("zeta", "d-4")
    grids = {c: JournalGrid(c, central.journal, make_settings(), threading.Event()) for c in ("shared", "zeta")}
    assert set(grids["shared"].get_node_ids()) == {flower_id("a-1"), flower_id("b-2")}
    assert set(grids["zeta"].get_node_ids()) == {flower_id("d-4")}
    content = {"max_rank": 8}
    message = grids["shared"].create_message(RecordDict({"config": ConfigRecord(content)}), "train", 0, "1")
    (offer,) = grids["shared"].push_messages([message])
    assert list(grids["shared"].push_messages([message])) == [offer]
    with pytest.raises(FederationError, match="not one of cohort 'zeta'"):
        grids["zeta"].pull_messages([offer])
    with pytest.raises(FederationError, match="No Flower run"):
        _ = grids["zeta"].run
    assert list(grids["shared"].send_and_receive([message], timeout=0)) == []


def _states(central: Central) -> set[str]:
    with central.journal.read() as state:
        return {update.state for update in state.updates.values()}


def _waiting(central: Central) -> list:
    with central.journal.read() as state:
        return state.waiting("shared")


def _candidates(central: Central) -> list[str]:
    with central.journal.read() as state:
        return [plan.candidate for plan in state.plans.values() if plan.candidate]
