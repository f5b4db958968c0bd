"""Strategies of flwr.serverapp.strategy by name, through our loop: which work, what they carry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp import strategy as stock_strategies

from central.cohort import check_strategy
from central.cohort.errors import StrategyFailed
from central.cohort.planning import plan_merge
from central.cohort.strategies.flower import UNUSABLE, usable_strategies
from central.cohort.strategies.moments import CARRIED
from central.errors import SettingsError
from protos.lora import LoraTensors
from tests.contract.cohort_loop import (
    NAMES,
    Central,
    answering,
    make_settings,
    opened,
    result,
    take_steps,
)
from tests.contract.stock_merges import NODES, OPTIONS, digests, increments, merge, release_states


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        central.join("shared", *NODES)
        yield central


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


def test_a_strategy_that_keeps_what_no_release_carries_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "central.cohort.strategies.flower.CARRIED", {**CARRIED, "FedAdam": ("m_t",)}
    )
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
    flat = np.stack(
        [
            np.concatenate([m[n][i].ravel() for n in NAMES for m in (A, B)])
            for i in range(len(tensors))
        ]
    )
    distances = np.square(flat[:, None] - flat[None]).sum(-1)
    best = int(
        np.argmin(np.sort(distances, 1)[:, 1])
    )  # with three nodes and none malicious: the nearest other one
    return {n: B[n][best] @ A[n][best] for n in NAMES}


@pytest.mark.parametrize("name", ["FedMedian", "Krum"])
def test_robust_strategies_do_what_their_papers_say(name: str, central: Central) -> None:
    merge(central, 1, name)
    for module, product in expected_average(name, increments(1)).items():
        np.testing.assert_allclose(central.product(central.head(), module), product, atol=1e-4)


def test_a_strategy_that_fails_whatever_the_updates_are_blames_none_and_says_what_to_change(
    central: Central,
) -> None:
    ids = [
        central.admit(node, tensors)
        for node, tensors in zip(NODES[:2], increments(1)[:2], strict=True)
    ]
    # With half of two cut off at both ends nothing is left; run_cohort refuses such options, a plan
    # of three would do.
    settings = make_settings(
        strategy="FedTrimmedAvg", strategy_options={"beta": 0.5}, min_updates=2
    )
    with pytest.raises(
        StrategyFailed, match=r"not finite.*No single update causes it.*CENTRAL_MERGE__STRATEGY"
    ):
        take_steps(central, settings, lambda: False)
    assert {state_of(central, update) for update in ids} == {"planned"}
    take_steps(
        central, make_settings(strategy="FedAvg"), lambda: central.head().manifest.version == 1
    )
    assert central.head().manifest.updates == ids, (
        "planned anew with the settings of the next start"
    )


def state_of(central: Central, update_id: str) -> str:
    with central.journal.read() as state:
        return state.updates[update_id].state


def test_a_strategy_that_needs_several_updates_waits_for_them_beyond_the_age(
    central: Central,
) -> None:
    late = "2026-11-23T12:00:00.000000Z"
    settings = make_settings(strategy="Bulyan", min_updates=4, max_age_s=60).merge
    with central.journal.read() as state:
        for number, tensors in enumerate(increments(1), start=1):
            assert plan_merge(state, "shared", settings, late) is None, f"{number - 1} updates wait"
            central.admit(NODES[number - 1], tensors)
        plan = plan_merge(state, "shared", settings, late)
    assert plan is not None
    assert len(plan.updates) == 3


def test_a_rejected_candidate_is_not_cut_into_parts_that_the_strategy_cannot_merge(
    central: Central,
) -> None:
    ids = [central.admit(node, tensors) for node, tensors in zip(NODES, increments(1), strict=True)]
    settings = make_settings(quorum=1, strategy="Bulyan", min_updates=3)
    with answering(
        central.journal, lambda node: ([result("acme", both=2, b=14, c=0, neither=4)], "")
    ):
        take_steps(central, settings, lambda: "rejected" in release_states(central))
    assert {state_of(central, update) for update in ids} == {"set_aside"}
