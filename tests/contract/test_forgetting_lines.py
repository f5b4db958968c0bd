"""Forgetting beside other lines: a cohort that builds on it, a canary, a crash at any append."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from central.operators.forgetting import propose_forget
from central.settings import ChannelSettings
from tests.contract.cohort_loop import (
    NAMES,
    Central,
    answering,
    crashing_at,
    make_increment,
    make_settings,
    opened,
    result,
    take_steps,
)
from tests.contract.forgetting import (
    NODES,
    forget,
    increment,
    line_states,
    order_state,
    release,
    run_until,
    states,
)


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        yield central


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_crash_at_any_append_ends_the_same(stride: int, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    with opened(origin) as central:
        central.join("shared", *NODES)
        ids = [update for version in (1, 2) for update in release(central, version)]
        forget(central, "b-2")
    ends, crashes, point = set(), 0, 0
    while True:
        root = tmp_path / str(point)
        shutil.copytree(origin, root)
        crashed = _run_with_crash(root, point)
        crashes += crashed
        if crashed:
            assert not _run_with_crash(root, None)
        with opened(root) as central, central.journal.read() as state:
            assert central.journal.verify() == state.sequence
            ends.add((central.head().release_id, tuple(states(central, ids)), len(state.plans)))
        if not crashed:
            break
        point += stride
    assert crashes == -(-2 * 4 // stride), "plan, candidate, evaluation, verdict"
    assert len(ends) == 1


def _run_with_crash(root: Path, crash_at: int | None) -> bool:
    """True when it crashed."""
    with opened(root) as central:
        with central.journal.read() as state:
            (order,) = state.forgets
        reports = answering(central.journal, lambda node: ([result("acme")], ""))
        with crashing_at(central, crash_at) as crash, reports:
            assert run_until(central, order, quorum=1) == "done"
        return crash.happened


def test_a_cohort_that_builds_on_it_is_composed_anew(tmp_path: Path) -> None:
    settings = {"min_updates": 1}
    with opened(tmp_path, {"acme": "shared"}) as central:
        central.join("shared", *NODES)
        ids = release(central, 1)
        central.join("acme", "d-4")
        own = central.admit("d-4", make_increment(90), "acme")
        take_steps(
            central, make_settings(**settings), lambda: "merged" in states(central, [own]), "acme"
        )  # type: ignore[arg-type]
        take_steps(
            central,
            make_settings(**settings),
            lambda: central.head("acme").manifest.version == 2,
            "acme",
        )  # type: ignore[arg-type]
        holding = central.head("acme")
        proposal = propose_forget(central.journal, central.blobs, ids[1], False, "tests")
        assert proposal.composed == ("acme",)
        assert run_until(central, forget(central, ids[1])) == "done"
        with central.journal.read() as state:
            assert state.forgotten_in(holding.release_id) == [ids[1]]
            assert state.releases[holding.release_id].state == "accepted", (
                "what acme serves until it has another"
            )
        take_steps(
            central, make_settings(**settings), lambda: central.head("acme") != holding, "acme"
        )  # type: ignore[arg-type]
        with central.journal.read() as state:
            assert state.forgotten_in(central.head("acme").release_id) == []
            assert state.releases[holding.release_id].state == "withdrawn"
        # Its own contribution goes from its own chain, and what it is composed with stays.
        assert run_until_in(central, forget(central, "d-4"), "acme") == "done"
        served, shared = (
            central.product(central.head(cohort), NAMES[0]) for cohort in ("acme", "shared")
        )
        np.testing.assert_allclose(served, shared, atol=1e-5)


def run_until_in(central: Central, order_id: str, cohort: str) -> str:
    over = ("done", "rejected", "failed")
    take_steps(central, make_settings(), lambda: order_state(central, order_id) in over, cohort)
    return order_state(central, order_id)


def test_what_only_a_canary_holds_is_forgotten_and_its_others_wait_again(central: Central) -> None:
    central.join("shared", *NODES)
    release(central, 1, NODES[:1])
    ids = [central.admit(node, increment(2, node), sequence=2) for node in NODES]  # type: ignore[arg-type]
    settings = make_settings(min_updates=3).model_copy(
        update={"channels": ChannelSettings(first="canary")}
    )
    take_steps(central, settings, lambda: "merged" in states(central, ids))
    with central.journal.read() as state:
        canary = state.channels[("shared", "canary")]
    assert order_state(central, forget(central, ids[1])) == "done"
    assert states(central, ids) == ["waiting", "forgotten", "waiting"]
    with central.journal.read() as state:
        assert state.releases[canary].state == "withdrawn"
        assert ("shared", "canary") not in state.channels


def test_a_removal_soaks_on_canary_like_any_release(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    order = forget(central, ids[1])
    settings = make_settings().model_copy(update={"channels": ChannelSettings(first="canary")})

    def on_canary() -> bool:
        with central.journal.read() as state:
            return ("shared", "canary") in state.channels

    take_steps(central, settings, on_canary)
    assert (order_state(central, order), states(central, ids)) == ("planned", ["merged"] * 3), (
        "stable still holds it"
    )
    with central.journal.read() as state:
        canary = state.channels[("shared", "canary")]
    central.registry.promote(canary, "stable", "tests")
    assert (order_state(central, order), states(central, ids)) == (
        "done",
        ["merged", "forgotten", "merged"],
    )


def test_a_removal_that_is_rolled_back_from_canary_leaves_everything_as_it_was(
    central: Central,
) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    order = forget(central, ids[1])
    settings = make_settings().model_copy(update={"channels": ChannelSettings(first="canary")})
    take_steps(central, settings, lambda: len(line_states(central)) == 3)
    central.registry.rollback("shared", None, "requeue", "tests", "canary")
    assert (order_state(central, order), states(central, ids)) == ("failed", ["merged"] * 3)
    assert line_states(central) == ["accepted", "accepted", "abandoned"]
