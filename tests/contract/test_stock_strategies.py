"""Strategies of flwr.serverapp.strategy by name, through our loop and journal: which work, and what they carry between merges."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as stock_strategies

from central.errors import SettingsError
from central.federation import check_strategy
from central.federation.errors import StrategyFailed
from central.federation.planning import plan_merge
from central.federation.server_state import CARRIED, ServerState
from central.federation.stock import UNUSABLE, StockMean, usable_strategies
from central.federation.strategy import to_arrays, to_tensors
from central.federation.verify import verify_releases
from protos.lora import LoraModule, LoraTensors
from tests.contract.cohort_loop import (
    IN,
    KEY,
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
from tests.contract.test_releases_verify import public_key

NODES = ("a-1", "b-2", "c-3")
OPTIONS: dict[str, dict[str, Any]] = {
    "FedAdagrad": {"eta": 0.2},
    "FedAdam": {"eta": 0.2, "beta_1": 0.8},
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.5},
    "FedYogi": {"eta": 0.2},
    "MultiKrum": {"num_nodes_to_select": 2},
}
STATEFUL = sorted(CARRIED)


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        central.join("shared", *NODES)
        yield central


def increments(version: int) -> list[LoraTensors]:
    """Version 2 brings a larger rank, and one module is missing in it; so what is carried has to grow and to stay."""
    rank, names = (5, NAMES[1:]) if version == 2 else (3, NAMES)
    return [make_increment(10 * version + number, rank=rank, names=names) for number in range(len(NODES))]


def merge(central: Central, version: int, strategy: str, **options: Any) -> None:
    """The next release, of three updates."""
    for node, tensors in zip(NODES, increments(version), strict=True):
        central.admit(node, tensors, sequence=version)
    settings = make_settings(
        strategy=strategy, strategy_options=options or OPTIONS.get(strategy, {}), min_updates=3, rank=12
    )
    before = central.head().manifest.version
    take_steps(central, settings, lambda: central.head().manifest.version == before + 1)


def digests(central: Central) -> list[tuple[str, str | None]]:
    """Payload and server state of every release of the stable line, oldest first."""
    with central.journal.read() as state:
        line = state.lineage(central.head().release_id)
    return [(release.manifest.payload.digest_sha256, release.server_state) for release in reversed(line)]


@pytest.mark.parametrize("name", stock_strategies.__all__)
def test_flwr_has_no_strategy_that_is_neither_usable_nor_refused_with_its_reason(name: str) -> None:
    if name in usable_strategies():
        check_strategy(name, OPTIONS.get(name, {}), 3)
        return
    with pytest.raises(SettingsError, match=UNUSABLE.get(name, "unknown strategy")):
        check_strategy(name, {}, 3)


@pytest.mark.parametrize(
    ("name", "options", "min_updates", "says"),
    [
        ("Bulyan", {"num_malicious_nodes": 1}, 3, "at least 7 updates"),
        ("Krum", {"num_malicious_nodes": 2}, 6, "at least 7 updates"),
        ("FedTrimmedAvg", {"beta": 0.5}, 2, "not finite"),
        ("FedAvg", {"fraction_train": 0.5}, 2, "not sampled"),
        ("FedAvg", {"min_train_nodes": 3}, 2, "MIN_UPDATES"),
        ("FedAvg", {"nonsense": 1}, 2, "nonsense"),
        ("Fedavg", {}, 2, r"unknown strategy 'Fedavg'\. Expected product-mean.*FedAvg"),
        ("FedAvg", {"train_metrics_aggr_fn": "mean"}, 2, "failed on 1 update"),
        ("FedProx", {"proximal_mu": 0.1}, 2, "at the nodes"),
        ("Krum", {"num_malicious_nodes": "many"}, 2, "many"),
    ],
)
def test_options_that_cannot_work_are_said_at_start(
    name: str, options: dict[str, Any], min_updates: int, says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        check_strategy(name, options, min_updates)


def test_a_strategy_that_keeps_what_no_release_carries_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("central.federation.trial.CARRIED", {**CARRIED, "FedAdam": ("m_t",)})
    with pytest.raises(SettingsError, match="keeps v_t between merges"):
        check_strategy("FedAdam", {}, 1)


@pytest.mark.parametrize("name", usable_strategies())
def test_every_usable_strategy_merges_release_after_release(name: str, central: Central) -> None:
    for version in (1, 2):
        merge(central, version, name)
        assert np.abs(central.product(central.head(), NAMES[1])).max() > 1e-3
    assert [state is not None for _, state in digests(central)] == [False, *[name in CARRIED] * 2]


def expected_average(name: str, tensors: Sequence[LoraTensors]) -> dict[str, np.ndarray]:
    """Products of what numpy makes of the factors, A and scale * B."""
    A = {n: np.stack([t.modules[n].A for t in tensors]) for n in NAMES}
    B = {n: np.stack([t.modules[n].scale * t.modules[n].B for t in tensors]) for n in NAMES}
    if name == "FedMedian":
        return {n: np.median(B[n], 0) @ np.median(A[n], 0) for n in NAMES}
    flat = np.stack([np.concatenate([m[n][i].ravel() for n in NAMES for m in (A, B)]) for i in range(len(tensors))])
    distances = np.square(flat[:, None] - flat[None]).sum(-1)
    best = int(np.argmin(np.sort(distances, 1)[:, 1]))  # with three nodes and none malicious: the nearest other one
    return {n: B[n][best] @ A[n][best] for n in NAMES}


@pytest.mark.parametrize("name", ["FedMedian", "Krum"])
def test_robust_strategies_do_what_their_papers_say(name: str, central: Central) -> None:
    merge(central, 1, name)
    for module, product in expected_average(name, increments(1)).items():
        np.testing.assert_allclose(central.product(central.head(), module), product, atol=1e-4)


def unstopped(name: str, versions: Sequence[int]) -> dict[str, np.ndarray]:
    """The sum of what one flwr strategy object, alive through all merges and with the final shapes, makes of the increments."""
    stock = getattr(stock_strategies, name)(
        min_train_nodes=1, min_available_nodes=1, min_evaluate_nodes=1, **OPTIONS.get(name, {})
    )
    total = {module: np.zeros((OUT, IN)) for module in NAMES}
    for number, version in enumerate(versions, start=1):
        zero = to_arrays(full(LoraTensors()))
        stock.current_arrays = None  # FedAvgM would go on from its last result; an increment starts from zero
        list(stock.configure_train(number, zero, ConfigRecord(), _Three()))  # type: ignore[arg-type]
        replies = [
            Message(
                RecordDict({"arrays": to_arrays(full(tensors)), "metrics": MetricRecord({"num-examples": 1.0})}),
                reply_to=Message(content=RecordDict(), dst_node_id=node, message_type="train"),
            )
            for node, tensors in enumerate(increments(version), start=1)
        ]
        averaged: ArrayRecord = stock.aggregate_train(number, replies)[0]
        for module in NAMES:
            total[module] += dense(to_tensors(averaged), module)
    return total


class _Three:
    def get_node_ids(self) -> range:
        return range(1, 4)


def full(tensors: LoraTensors) -> LoraTensors:
    modules = {}
    for name in NAMES:
        A, B = np.zeros((5, IN), np.float32), np.zeros((OUT, 5), np.float32)
        if (module := tensors.modules.get(name)) is not None:
            A[: module.rank], B[:, : module.rank] = module.A, np.float32(module.scale) * module.B
        modules[name] = LoraModule(A, B)
    return LoraTensors(modules)


@pytest.mark.parametrize("name", STATEFUL)
def test_what_is_carried_makes_a_strategy_go_on_as_if_it_had_never_stopped(name: str, central: Central) -> None:
    for version in (1, 2, 3):
        merge(central, version, name)
    for module, product in unstopped(name, (1, 2, 3)).items():
        np.testing.assert_allclose(central.product(central.head(), module), product, rtol=1e-3, atol=2e-4)
    for module, product in unstopped(name, (3,)).items():
        assert np.abs(central.product(central.head(), module) - product).max() > 1e-2, "not the last merge alone"


@pytest.mark.parametrize("name", STATEFUL)
def test_a_restart_between_merges_changes_no_bit(name: str, tmp_path: Path) -> None:
    for folder in ("whole", "restarted"):
        (tmp_path / folder).mkdir()
    with opened(tmp_path / "whole") as whole:
        whole.join("shared", *NODES)
        for version in (1, 2, 3):
            merge(whole, version, name)
        expected = digests(whole)
    with opened(tmp_path / "restarted") as first:
        first.join("shared", *NODES)
    for version in (1, 2, 3):
        with opened(tmp_path / "restarted") as again:
            merge(again, version, name)
            assert digests(again) == expected[: version + 1]
    assert len({state for _, state in expected}) == 4


def test_after_a_rollback_the_state_is_that_of_the_release_returned_to(central: Central, tmp_path: Path) -> None:
    merge(central, 1, "FedAdam")
    central.journal.close()
    shutil.copytree(tmp_path, tmp_path / "straight", ignore=shutil.ignore_patterns("straight"))
    with opened(tmp_path / "straight") as straight:
        merge(straight, 3, "FedAdam")
        expected = digests(straight)
    with opened(tmp_path) as bent:
        merge(bent, 2, "FedAdam")
        bent.registry.rollback("shared", None, "set_aside", "operator")
        merge(bent, 3, "FedAdam")
        assert digests(bent) == expected


def test_a_rejected_candidates_state_is_not_used(central: Central, tmp_path: Path) -> None:
    merge(central, 1, "FedAdam")
    central.journal.close()
    shutil.copytree(tmp_path, tmp_path / "straight", ignore=shutil.ignore_patterns("straight"))
    with opened(tmp_path / "straight") as straight:
        merge(straight, 3, "FedAdam")
        expected = digests(straight)
    with opened(tmp_path) as refused:
        for node, tensors in zip(NODES, increments(2), strict=True):
            refused.admit(node, tensors, sequence=2)
        settings = make_settings(
            quorum=1, strategy="FedAdam", strategy_options=OPTIONS["FedAdam"], min_updates=3, rank=12
        )
        gate = settings.gate.model_copy(update={"isolation_tries": 0})
        with answering(refused.journal, lambda node: ([result("acme", both=2, b=14, c=0, neither=4)], "")):
            take_steps(
                refused, settings.model_copy(update={"gate": gate}), lambda: "rejected" in release_states(refused)
            )
        merge(refused, 3, "FedAdam")
        assert digests(refused) == expected


def release_states(central: Central) -> set[str]:
    with central.journal.read() as state:
        return {release.state for release in state.releases.values()}


def test_another_strategy_starts_afresh(central: Central, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        for version, name in ((1, "FedAdam"), (2, "FedYogi"), (3, "FedAvg"), (4, "FedYogi"), (5, "FedYogi")):
            merge(central, version, name)
    kept = [None if d is None else ServerState.from_bytes(central.blobs.read(d)) for _, d in digests(central)]
    assert [None if state is None else state.merges for state in kept] == [None, 1, 1, None, 1, 2]
    assert [record.message for record in caplog.records].count("server state starts afresh") == 3


def test_verify_rebuilds_the_state_and_finds_another_one(central: Central, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (1, 2, 3):
        merge(central, version, "FedAdam")
    (_, first), (_, second), _ = digests(central)[1:]
    with central.journal.read() as state:
        releases = list(state.releases.values())

        def outcomes(*chosen: int, deep: bool = False) -> list[str]:
            picked = [releases[number] for number in chosen]
            found = verify_releases(state, picked, central.blobs, public_key(KEY), deep)
            return [f"{finding.outcome} {finding.problem}".strip() for finding in found]

        assert outcomes(0, 1, 2, 3) == ["identical"] * 4
        for digest in (first, second):
            central.blobs.path(str(digest)).unlink()
        assert "Blob" in outcomes(2)[0]
        assert outcomes(3, deep=True) == ["identical"] * 4, "deep makes the states itself"
        honest = StockMean.server_state

        def another(self: StockMean) -> bytes:
            kept = ServerState.from_bytes(honest(self) or b"")
            return ServerState(kept.merges + 1, kept.moments).to_bytes()

        monkeypatch.setattr(StockMean, "server_state", another)
        assert "rebuilt server state" in outcomes(1)[0]


def test_a_strategy_that_fails_whatever_the_updates_are_blames_none_and_says_what_to_change(central: Central) -> None:
    ids = [central.admit(node, tensors) for node, tensors in zip(NODES[:2], increments(1)[:2], strict=True)]
    # With half of two cut off at both ends nothing is left; run_cohort refuses such options, a plan of three would do.
    settings = make_settings(strategy="FedTrimmedAvg", strategy_options={"beta": 0.5}, min_updates=2)
    with pytest.raises(StrategyFailed, match=r"not finite.*No single update causes it.*CENTRAL_MERGE__STRATEGY"):
        take_steps(central, settings, lambda: False)
    assert {state_of(central, update) for update in ids} == {"planned"}
    take_steps(central, make_settings(strategy="FedAvg"), lambda: central.head().manifest.version == 1)
    assert central.head().manifest.updates == ids, "planned anew with the settings of the next start"


def state_of(central: Central, update_id: str) -> str:
    with central.journal.read() as state:
        return state.updates[update_id].state


def test_a_state_blob_is_the_same_bytes_for_the_same_state() -> None:
    rng = np.random.default_rng(0)
    moments = {"m_t": {"x/A": rng.random((2, 3), np.float32), "x/B": rng.random((4, 2), np.float32)}}
    data = ServerState(3, moments).to_bytes()
    again = ServerState.from_bytes(data)
    assert again.to_bytes() == data
    assert again.merges == 3
    assert again.shapes == {"x": ((2, 3), (4, 2))}


def test_a_strategy_that_needs_several_updates_waits_for_them_beyond_the_age(central: Central) -> None:
    late = "2026-11-23T12:00:00.000000Z"
    settings = make_settings(strategy="Bulyan", min_updates=4, max_age_s=60).merge
    with central.journal.read() as state:
        for number, tensors in enumerate(increments(1), start=1):
            assert plan_merge(state, "shared", settings, late) is None, f"{number - 1} updates wait"
            central.admit(NODES[number - 1], tensors)
        plan = plan_merge(state, "shared", settings, late)
    assert plan is not None
    assert len(plan.updates) == 3


def test_a_rejected_candidate_is_not_cut_into_parts_that_the_strategy_cannot_merge(central: Central) -> None:
    ids = [central.admit(node, tensors) for node, tensors in zip(NODES, increments(1), strict=True)]
    settings = make_settings(quorum=1, strategy="Bulyan", min_updates=3)
    with answering(central.journal, lambda node: ([result("acme", both=2, b=14, c=0, neither=4)], "")):
        take_steps(central, settings, lambda: "rejected" in release_states(central))
    assert {state_of(central, update) for update in ids} == {"set_aside"}
