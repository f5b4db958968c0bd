"""Merges of stock strategies, release after release, for the tests of strategies and of moments."""

from __future__ import annotations

from typing import Any

from protos.lora import LoraTensors
from tests.contract.cohort_loop import (
    NAMES,
    Central,
    make_increment,
    make_settings,
    take_steps,
)

NODES = ("a-1", "b-2", "c-3")
OPTIONS: dict[str, dict[str, Any]] = {
    "FedAdagrad": {"eta": 0.2},
    "FedAdam": {"eta": 0.2, "beta_1": 0.8},
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.5},
    "FedYogi": {"eta": 0.2},
    "MultiKrum": {"num_nodes_to_select": 2},
}


def increments(version: int) -> list[LoraTensors]:
    """Version 2 brings a larger rank and lacks one module: what is carried must grow and stay."""
    rank, names = (5, NAMES[1:]) if version == 2 else (3, NAMES)
    return [
        make_increment(10 * version + number, rank=rank, names=names)
        for number in range(len(NODES))
    ]


def merge(central: Central, version: int, strategy: str, **options: Any) -> None:
    """The next release, of three updates."""
    for node, tensors in zip(NODES, increments(version), strict=True):
        central.admit(node, tensors, sequence=version)
    settings = make_settings(
        strategy=strategy,
        strategy_options=options or OPTIONS.get(strategy, {}),
        min_updates=3,
        rank=12,
    )
    before = central.head().manifest.version
    take_steps(central, settings, lambda: central.head().manifest.version == before + 1)


def digests(central: Central) -> list[tuple[str, str | None]]:
    """Payload and server state of every release of the stable line, oldest first."""
    with central.journal.read() as state:
        line = state.lineage(central.head().release_id)
    return [
        (release.manifest.payload.digest_sha256, release.server_state) for release in reversed(line)
    ]


def release_states(central: Central) -> set[str]:
    with central.journal.read() as state:
        return {release.state for release in state.releases.values()}
