"""What a stock strategy carries from merge to merge: restarts, rollbacks, rejected candidates."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as stock_strategies

from central.cohort.strategies.flower import StockMean
from central.cohort.strategies.moments import CARRIED, ServerState
from central.cohort.strategies.product_mean import to_arrays, to_tensors
from central.cohort.verify import verify_releases
from protos.lora import LoraModule, LoraTensors
from tests.contract.cohort_loop import (
    IN,
    KEY,
    NAMES,
    OUT,
    Central,
    answering,
    dense,
    make_settings,
    opened,
    result,
    take_steps,
)
from tests.contract.stock_merges import NODES, OPTIONS, digests, increments, merge, release_states
from tests.contract.test_releases_verify import public_key

STATEFUL = sorted(CARRIED)


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        central.join("shared", *NODES)
        yield central


def unstopped(name: str, versions: Sequence[int]) -> dict[str, np.ndarray]:
    """What one flwr strategy object makes of the increments, summed over all merges.

    It is alive through all of them and has the final shapes.
    """
    stock = getattr(stock_strategies, name)(
        min_train_nodes=1, min_available_nodes=1, min_evaluate_nodes=1, **OPTIONS.get(name, {})
    )
    total = {module: np.zeros((OUT, IN)) for module in NAMES}
    for number, version in enumerate(versions, start=1):
        zero = to_arrays(full(LoraTensors()))
        stock.current_arrays = (
            None  # FedAvgM would go on from its last result; an increment starts from zero
        )
        list(stock.configure_train(number, zero, ConfigRecord(), _Three()))  # type: ignore[arg-type]
        replies = [
            Message(
                RecordDict(
                    {
                        "arrays": to_arrays(full(tensors)),
                        "metrics": MetricRecord({"num-examples": 1.0}),
                    }
                ),
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
def test_what_is_carried_makes_a_strategy_go_on_as_if_it_had_never_stopped(
    name: str, central: Central
) -> None:
    for version in (1, 2, 3):
        merge(central, version, name)
    for module, product in unstopped(name, (1, 2, 3)).items():
        np.testing.assert_allclose(
            central.product(central.head(), module), product, rtol=1e-3, atol=2e-4
        )
    for module, product in unstopped(name, (3,)).items():
        assert np.abs(central.product(central.head(), module) - product).max() > 1e-2, (
            "not the last merge alone"
        )


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


def test_after_a_rollback_the_state_is_that_of_the_release_returned_to(
    central: Central, tmp_path: Path
) -> None:
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
            quorum=1,
            strategy="FedAdam",
            strategy_options=OPTIONS["FedAdam"],
            min_updates=3,
            rank=12,
        )
        gate = settings.gate.model_copy(update={"isolation_tries": 0})
        with answering(
            refused.journal, lambda node: ([result("acme", both=2, b=14, c=0, neither=4)], "")
        ):
            take_steps(
                refused,
                settings.model_copy(update={"gate": gate}),
                lambda: "rejected" in release_states(refused),
            )
        merge(refused, 3, "FedAdam")
        assert digests(refused) == expected


def test_another_strategy_starts_afresh(central: Central, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        for version, name in (
            (1, "FedAdam"),
            (2, "FedYogi"),
            (3, "FedAvg"),
            (4, "FedYogi"),
            (5, "FedYogi"),
        ):
            merge(central, version, name)
    kept = [
        None if d is None else ServerState.from_bytes(central.blobs.read(d))
        for _, d in digests(central)
    ]
    assert [None if state is None else state.merges for state in kept] == [None, 1, 1, None, 1, 2]
    assert [record.message for record in caplog.records].count("server state starts afresh") == 3


def test_verify_rebuilds_the_state_and_finds_another_one(
    central: Central, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_state_blob_is_the_same_bytes_for_the_same_state() -> None:
    rng = np.random.default_rng(0)
    moments = {
        "m_t": {"x/A": rng.random((2, 3), np.float32), "x/B": rng.random((4, 2), np.float32)}
    }
    data = ServerState(3, moments).to_bytes()
    again = ServerState.from_bytes(data)
    assert again.to_bytes() == data
    assert again.merges == 3
    assert again.shapes == {"x": ((2, 3), (4, 2))}
