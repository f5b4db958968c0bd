"""central is killed at every fault point and goes on: releases are bit-identical."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from central import faults
from central.errors import SettingsError
from central.journal import EventKind
from central.settings import CentralSettings
from tests.contract import central_harness as harness
from tests.contract.crash_ending import PAYLOADS, Ending
from tests.contract.crash_story import CONTRIBUTIONS, prepare, tell

Prepared = tuple[CentralSettings, list[harness.Node]]
# What happens before the first node is there, or only while an earlier kill is recovered from, is
# reached otherwise.
QUICK = (
    "intake.kept#2",
    "head.kept#2",
    "journal.evaluation_offered.stored#2",
    "journal.verdict.stored#1",
)
WITH_STATE = (
    "merge.state_kept#2",
    "journal.candidate_built.applied#2",
    "journal.candidate_built.stored#2",
)
"""Points of a strategy that carries state from merge to merge."""
ELSEWHERE = (
    "merge.state_kept",
    "merge.own_kept",
    "journal.canary_reported.applied",
    "journal.canary_reported.stored",
    *(f"journal.{event}.{step}" for event in CONTRIBUTIONS for step in ("applied", "stored")),
)
"""Points that this story does not reach.

They are those of strategies with state (below), of channels (test_crash_channels.py), and of what
nodes and operators do besides (test_crash_contributions.py).
"""
COMPLETE = (
    "intake.checked",
    "blob.written",
    "blob.published",
    "intake.kept",
    "journal.update_admitted.applied",
    "journal.update_admitted.stored",
    "intake.recorded",
    "intake.admitted",
)
"""A payload is on disk by then, and need not come again."""
EVERY = [
    *(
        f"{point}#1"
        for point in sorted(faults.POINTS)
        if point not in (*faults.RETENTION, *faults.TRANSFER, *ELSEWHERE)
        and not point.startswith("journal.cohort_created")
    ),
    "intake.chunk_written#3",
    "intake.admitted#4",
    "merge.candidate_kept#3",
    "journal.merge_planned.stored#3",
    "journal.evaluation_offered.applied#2",  # the second look
    "journal.evaluation_reported.stored#2",
    "journal.verdict.applied#3",
]


@pytest.fixture(scope="module")
def shared() -> dict[str, object]:
    """What the module's tests make once."""
    return {}


@pytest.fixture
async def prepared(shared: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    if "prepared" not in shared:
        shared["prepared"] = await prepare(tmp_path_factory.mktemp("prepared"))
    return shared["prepared"]  # type: ignore[return-value]


@pytest.fixture
async def undisturbed(
    shared: dict[str, object], prepared: Prepared, tmp_path_factory: pytest.TempPathFactory
) -> Ending:
    if "undisturbed" not in shared:
        shared["undisturbed"], kills = await tell(
            prepared, tmp_path_factory.mktemp("undisturbed"), None
        )
        assert kills == 0
    return shared["undisturbed"]  # type: ignore[return-value]


async def check(prepared: Prepared, undisturbed: Ending, folder: Path, fault: str) -> None:
    assert undisturbed.merged_in == [(1, "merged"), (1, "merged"), (2, "merged"), (2, "merged")]
    assert (undisturbed.admissions, undisturbed.verdicts, undisturbed.rollbacks) == (
        4,
        [True] * 3,
        1,
    )
    assert undisturbed.looks == [1, 2] * 3
    ending, kills = await tell(prepared, folder, fault)
    assert (kills, ending) == (1, undisturbed)
    assert ending.resent_bytes <= most_resent(*fault.split("#"))


def most_resent(point: str, count: str) -> int:
    """Bytes of the killed upload that central cannot have had. Each piece has 300 bytes."""
    written = 300 * int(count) if point == "intake.chunk_written" else 0
    return 0 if point in COMPLETE else max(0, max(map(len, PAYLOADS)) - written)


@pytest.mark.parametrize("fault", QUICK)
async def test_a_killed_central_ends_as_an_undisturbed_one(
    prepared: Prepared, undisturbed: Ending, tmp_path: Path, fault: str
) -> None:
    await check(prepared, undisturbed, tmp_path, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in EVERY if fault not in QUICK])
async def test_every_fault_point(
    prepared: Prepared, undisturbed: Ending, tmp_path: Path, fault: str
) -> None:
    await check(prepared, undisturbed, tmp_path, fault)


@pytest.mark.slow
async def test_fedadam_killed_between_two_merges_goes_on_with_its_moments(
    prepared: Prepared, tmp_path: Path
) -> None:
    whole, _ = await tell(prepared, tmp_path / "whole", None, "FedAdam")
    assert len(set(whole.server_states)) == 3
    for number, fault in enumerate(WITH_STATE):
        ending, kills = await tell(prepared, tmp_path / f"killed-{number}", fault, "FedAdam")
        assert (fault, kills, ending) == (fault, 1, whole)


@pytest.fixture
def disarmed() -> Iterator[None]:
    yield
    faults._armed = None


@pytest.mark.usefixtures("disarmed")
@pytest.mark.parametrize(
    "value", ["", "intake.kept", "intake.kept#0", "intake.kept#x", "nowhere#1"]
)
def test_a_fault_that_is_not_one_ends_the_start(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(faults.VARIABLE, value)
    with pytest.raises(SettingsError, match="unset it"):
        faults.arm()


def test_every_event_of_the_journal_has_fault_points() -> None:
    missing = {
        f"journal.{kind}.{step}" for kind in EventKind for step in ("applied", "stored")
    } - set(faults.POINTS)
    assert not missing


def test_without_the_variable_nothing_is_armed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("killed"))
    faults.arm()
    for point in faults.POINTS:
        faults.reach(point)
