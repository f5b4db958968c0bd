"""The loop with releases on canary: what waits, what comes next, a canary taken back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from central.releases.canary import record_report
from central.settings import CentralSettings, ChannelSettings
from tests.contract.cohort_loop import (
    NAMES,
    Central,
    dense,
    make_increment,
    make_loop,
    make_settings,
    opened,
    take_steps,
)
from tests.unit.central.builders import AT

SETTINGS = make_settings().model_copy(
    update={"channels": ChannelSettings(first="canary", soak_s=60)}
)
LATER = "2026-11-22T12:01:00.000000Z"
"""A minute after everything in the journal."""


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as running:
        running.join("shared", "a-1", "b-2")
        yield running


def admit(central: Central, round_number: int) -> None:
    for number, node in enumerate(("a-1", "b-2")):
        central.admit(node, make_increment(10 * round_number + number), sequence=round_number)


def versions(central: Central) -> tuple[int, int | None]:
    """What stable and canary point at."""
    with central.journal.read() as state:
        stable, canary = state.head("shared"), state.head("shared", "canary")
    assert stable is not None
    return stable.manifest.version, canary.manifest.version if canary else None


def steps(
    central: Central,
    until: tuple[int, int | None],
    clock: str = AT,
    settings: CentralSettings = SETTINGS,
) -> None:
    take_steps(central, settings, lambda: versions(central) == until, clock=lambda: clock)


def serve(central: Central, node: str) -> None:
    with central.journal.read() as state:
        canary = state.channels["shared", "canary"]
    record_report(central.journal, node, "shared", "canary", canary, "")


def test_a_release_soaks_then_is_stable_and_the_next_builds_on_it(central: Central) -> None:
    admit(central, 1)
    steps(central, (0, 1))
    admit(central, 2)  # nodes on stable go on learning
    serve(central, "a-1")
    steps(central, (1, 2), LATER)
    with central.journal.read() as state:
        line = [release.manifest for release in state.lineage(state.channels["shared", "canary"])]
        assert [len(release.updates) for release in line] == [2, 2, 0]
        assert {update.state for update in state.updates.values()} == {"merged"}
        assert [change.by for change in state.channel_changes["shared", "stable"]] == [
            "central",
            "central",
        ]
    for name in NAMES:
        product = central.product(central.head(), name)
        np.testing.assert_allclose(
            product, sum(dense(make_increment(s), name) for s in (10, 11)) / 2, atol=1e-4
        )


def test_a_canary_that_is_taken_back_gives_its_updates_to_the_next_one(central: Central) -> None:
    admit(central, 1)
    steps(central, (0, 1))
    central.registry.rollback("shared", None, "requeue", "ops", "canary")
    assert versions(central) == (0, None)
    steps(central, (0, 1), LATER)
    serve(central, "b-2")
    central.registry.promote(_canary(central), "stable", "ops")
    assert versions(central) == (1, None)
    for name in NAMES:
        product = central.product(central.head(), name)
        np.testing.assert_allclose(
            product, sum(dense(make_increment(s), name) for s in (10, 11)) / 2, atol=1e-4
        )


def test_a_canary_that_nobody_serves_waits_and_the_log_says_so_once(
    central: Central, caplog: pytest.LogCaptureFixture
) -> None:
    admit(central, 1)
    steps(central, (0, 1))
    admit(central, 2)
    make_loop(central, SETTINGS, clock=lambda: LATER, stop=_StopsAfter(3)).step()
    assert versions(central) == (0, 1)
    assert [record.message for record in caplog.records if "canary" in record.message] == [
        "canary waits, and the cohort's merges with it"
    ]


def _canary(central: Central) -> str:
    with central.journal.read() as state:
        return state.channels["shared", "canary"]


class _StopsAfter(threading.Event):
    """Set after it was asked a few times."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self._left = asked

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0
