"""Disk and certificate."""

from __future__ import annotations

import asyncio
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_node.certificate import NEAR_END
from edge_node.identity import clock_advice
from edge_node.problems import Problems
from edge_node.surroundings import (
    LOW_DISK_BYTES,
    give_room,
    keep_room,
    look_around,
    surroundings,
)
from lorikeet.ballast import BALLAST
from tests.fakes.identity import LIFETIME, make_identity

DAY = timedelta(days=1)


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 42, free=size)
    )


@pytest.mark.parametrize(
    ("before_end", "text"),
    [
        (NEAR_END + DAY, None),
        (DAY, "This node's certificate ends on"),
        (-DAY, "is valid from"),
        (LIFETIME + 3 * DAY, "is valid from"),
    ],
)
def test_a_certificate_that_is_near_its_end_or_not_valid(
    tmp_path: Path, before_end: timedelta, text: str | None
) -> None:
    identity = make_identity(tmp_path)
    now = datetime.now(UTC) + LIFETIME - before_end
    wrong = dict(surroundings(tmp_path, identity, now))["certificate"]
    assert (wrong is None) == (text is None)
    if wrong is not None:
        assert str(text) in wrong[0]
        assert "central tokens create" in wrong[1]
        if "is valid from" in wrong[0]:  # `doctor` says the same
            assert clock_advice("", identity.certificate_pem, now) == " ".join(wrong)


def test_a_disk_that_is_nearly_full_or_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = make_identity(tmp_path)
    gone = dict(surroundings(tmp_path / "absent", identity))["disk"]
    assert gone is not None
    assert "No such file" in gone[0]
    free(monkeypatch, LOW_DISK_BYTES)
    assert dict(surroundings(tmp_path, identity))["disk"] is None
    free(monkeypatch, 5 << 20)
    wrong = dict(surroundings(tmp_path, identity))["disk"]
    assert wrong is not None
    assert "5 MiB free" in wrong[0]


async def test_both_are_looked_at_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity, problems = make_identity(tmp_path), Problems(tmp_path)
    monkeypatch.setattr("edge_node.surroundings.PERIOD_S", 0.01)
    monkeypatch.setattr("edge_node.certificate.NEAR_END", timedelta(0))
    free(monkeypatch, 0)
    looking = asyncio.create_task(look_around(tmp_path, identity))
    async with asyncio.timeout(5):
        while [problem.room for problem in problems.current()] != ["disk"]:
            await asyncio.sleep(0.01)
        free(monkeypatch, LOW_DISK_BYTES)
        while problems.current():
            await asyncio.sleep(0.01)
    looking.cancel()


def test_room_for_a_start_is_kept_and_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / BALLAST
    keep_room(tmp_path)
    assert file.stat().st_blocks * 512 >= file.stat().st_size == 8 << 20, "its blocks are allocated"
    keep_room(tmp_path)
    give_room(tmp_path)
    assert not file.exists()
    give_room(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, free=4096)
    )
    keep_room(tmp_path)
    assert not file.exists(), "not the last bytes of a disk that is full"
    keep_room(tmp_path / "absent")
    give_room(tmp_path / "absent")
