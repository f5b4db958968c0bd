"""Time passes as it does, whatever the machine's clock does, and never falls behind the journal."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from central.cohort.planning import plan_merge
from central.fleet.tokens import create_token, expect_usable
from central.journal import Journal
from central.settings import MergePolicy
from lorikeet.clock import Clock, steady_s
from tests.unit.central import builders as make

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC)
DAY = timedelta(days=1)


class Machine:
    """A machine whose clock somebody sets."""

    def __init__(self) -> None:
        self.wall = NOON
        self.seconds = 1000.0

    def passes(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)
        self.seconds += seconds

    def clock(self) -> Clock:
        return Clock(lambda: self.wall, lambda: self.seconds)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.mark.parametrize("jump", [DAY, -DAY, 3650 * DAY, -3650 * DAY])
def test_a_jump_of_the_machines_clock_changes_nothing(machine: Machine, jump: timedelta) -> None:
    clock = machine.clock()
    assert clock() == "2026-11-26T12:00:00.000000Z"
    machine.passes(90)
    machine.wall += jump
    machine.passes(30)
    assert clock() == "2026-11-26T12:02:00.000000Z"


def test_a_jump_is_said_once(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    clock = machine.clock()
    with caplog.at_level(logging.INFO, "lorikeet.clock"):
        machine.wall += timedelta(seconds=59)
        clock()
        assert not caplog.records
        machine.wall += DAY
        clock(), clock()
        (record,) = caplog.records
        assert vars(record)["machine"] == "2026-11-27T12:00:59+00:00"
        assert vars(record)["counted"] == "2026-11-26T12:00:00+00:00"
        machine.wall -= DAY
        clock(), clock()
    assert "the same again" in caplog.records[1].message
    assert len(caplog.records) == 2


def test_a_restart_with_an_earlier_clock_goes_on_from_the_last_event(machine: Machine) -> None:
    clock = machine.clock()
    clock.go_on_from("2026-11-27T12:00:00.000000Z")
    assert clock() == "2026-11-27T12:00:00.000000Z"
    machine.passes(5)
    assert clock() == "2026-11-27T12:00:05.000000Z"


def test_a_restart_with_a_later_clock_follows_it(machine: Machine) -> None:
    clock = machine.clock()
    clock.go_on_from("2026-11-25T12:00:00.000000Z")
    assert clock() == "2026-11-26T12:00:00.000000Z"


def test_steady_seconds_pass() -> None:
    assert steady_s() <= steady_s()


def test_a_central_that_was_a_day_ahead_makes_nobody_wait_a_day(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that waits, and a token, are as old after the correction as they were before."""
    monkeypatch.setattr("central.journal.journal.Clock", machine.clock)
    url = f"sqlite:///{tmp_path}/journal.db"
    genesis = make.make_release()
    policy = MergePolicy(min_updates=2, max_age_s=600)
    machine.wall += DAY
    ahead = Journal(url)
    ahead.append(make.cohort_created(genesis), make.token_created(), make.node_enrolled())
    ahead.append(make.admitted(make.make_update(genesis)))
    create_token(ahead, b"ca", "shared", 1, 600, "operator")
    ahead.close()

    machine.passes(300)
    machine.wall -= DAY
    corrected = Journal(url)
    with corrected.read() as state:
        assert plan_merge(state, "shared", policy, corrected.clock()) is None
        token = list(state.tokens.values())[-1]
        expect_usable(token, corrected.now())
    machine.passes(601)
    with corrected.read() as state:
        assert plan_merge(state, "shared", policy, corrected.clock()) is not None
        with pytest.raises(ValueError, match="expired"):
            expect_usable(token, corrected.now())
    corrected.close()
