"""Flower's ServerApp, Strategy and Grid on a real journal: ours and FedAvg, crashes, cohorts."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from central.cohort import run_cohort
from central.cohort.errors import FederationError
from central.cohort.offers import JournalGrid, flower_id
from central.cohort.strategies.product_mean import ProductMean
from central.journal import EventKind, NewEvent
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
    make_loop,
    make_settings,
    opened,
    result,
    take_steps,
)


class Crash(Exception):
    """Stands for kill -9: nothing after it runs, the journal is opened again."""


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        yield central


def test_product_mean_merges_in_product_space_release_after_release(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    increments = [make_increment(1), make_increment(2, rank=5, scale=0.5, names=NAMES[:1])]
    ids = [
        central.admit(node, tensors)
        for node, tensors in zip(("a-1", "b-2"), increments, strict=True)
    ]
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
        expected = central.product(first, name) + 0.75 * sum(
            dense(tensors, name) for tensors in more
        )
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
        np.testing.assert_allclose(
            central.product(central.head(), name), (B1 + B2) / 2 @ (A1 + A2) / 2, atol=1e-4
        )
    before = central.product(central.head(), NAMES[0])
    third = make_increment(3, rank=2)
    central.admit("a-1", third, sequence=2)
    central.admit("b-2", third, sequence=2)
    take_steps(central, settings, lambda: central.head().manifest.version == 2)
    np.testing.assert_allclose(
        central.product(central.head(), NAMES[0]), before + dense(third, NAMES[0]), atol=1e-4
    )


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
    # Four appends (offer, plan, candidate, evaluation offer) and the verdict, each with a crash
    # before and after it.
    assert crashes == 10
    assert len(heads) == 1


def _run_until_released(root: Path, settings: CentralSettings, crash_at: int | None) -> bool:
    """True when it crashed at append crash_at // 2: before (even) or after it (odd)."""
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
    loop = make_loop(central, make_settings())
    loop._builder.build = lambda *_: None  # type: ignore[method-assign]
    loop.step()
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
    with answering(
        central.journal, lambda node: ([result("acme-a", both=2, b=14, c=0, neither=4)], "")
    ):
        take_steps(central, make_settings(quorum=1), lambda: _states(central) == {"set_aside"})
    assert central.head().manifest.version == 0
    with central.journal.read() as state:
        assert all("acme-a fell" in update.reason for update in state.updates.values())


def test_an_unusable_update_is_set_aside_and_the_others_go_on(central: Central) -> None:
    central.join("shared", "a-1", "b-2", "c-3")
    central.admit("a-1", make_increment(1))
    odd = LoraTensors(
        {NAMES[0]: LoraModule(np.ones((2, IN + 1), np.float32), np.ones((OUT, 2), np.float32))}
    )
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
        threading.Thread(
            target=run_cohort,
            args=(c, central.journal, central.registry, central.blobs, settings, stop),
        )
        for c in ("shared", "zeta")
    ]
    for thread in threads:
        thread.start()
    try:
        done = central.journal.wait(
            lambda state: all(state.head(c).manifest.version == 1 for c in ("shared", "zeta")),
            timeout_s=30,
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
        central.product(central.head("zeta"), NAMES[0]),
        dense(make_increment(9), NAMES[0]),
        atol=1e-4,
    )


def test_a_candidate_takes_one_strategy_and_its_verdict_none(
    central: Central, monkeypatch: pytest.MonkeyPatch
) -> None:
    central.join("shared", "a-1", "b-2")
    for number, node in enumerate(("a-1", "b-2")):
        central.admit(node, make_increment(number))
    calls: list[str] = []

    def noted(kind: type, name: str) -> None:
        honest = getattr(kind, name)

        def call(*args: object) -> object:
            calls.append(name)
            return honest(*args)

        monkeypatch.setattr(kind, name, call)

    noted(ProductMean, "__init__")
    noted(JournalGrid, "pull_messages")
    loop = make_loop(central, make_settings(quorum=1))
    loop.step()
    assert calls == ["__init__", "pull_messages"]
    with answering(central.journal, lambda node: ([result("acme-a")], "")):
        loop.step()
    assert central.head().manifest.version == 1
    assert calls == ["__init__", "pull_messages"], "what is judged is not merged again"


def test_a_grid_sees_one_cohort(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    central.join("zeta", "d-4")
    ids = [central.admit(node, make_increment(n)) for n, node in enumerate(("a-1", "b-2"))]
    take_steps(central, make_settings(), lambda: central.head().manifest.version == 1)
    grids = {c: JournalGrid(c, central.journal, threading.Event()) for c in ("shared", "zeta")}
    assert set(grids["shared"].get_node_ids()) == {flower_id("a-1"), flower_id("b-2")}
    assert set(grids["zeta"].get_node_ids()) == {flower_id("d-4")}
    plan = central.head().manifest.plan
    asked = Message(RecordDict({"config": ConfigRecord({"plan": plan})}), 0, "train")
    replies = list(grids["shared"].send_and_receive([asked]))
    assert [reply.content["update"]["update_id"] for reply in replies] == ids
    with pytest.raises(FederationError, match="not one of cohort 'zeta'"):
        grids["zeta"].send_and_receive([asked])
    with pytest.raises(FederationError, match=r"Grid\.run has no use"):
        _ = grids["zeta"].run


def _states(central: Central) -> set[str]:
    with central.journal.read() as state:
        return {update.state for update in state.updates.values()}


def _waiting(central: Central) -> list:
    with central.journal.read() as state:
        return state.waiting("shared")
