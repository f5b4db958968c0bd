"""How many connections fit into the open files that a process may have."""

from __future__ import annotations

import logging
import resource

import pytest

from central import descriptors
from central.descriptors import allowed_connections, connections_that_fit
from central.settings import LimitSettings


@pytest.mark.parametrize(
    ("files", "expected"),
    [(20_000, 4096), (1024, 352), (322, 1), (100, 1)],
)
def test_connections_leave_room_for_what_they_ask_for(files: int, expected: int) -> None:
    assert connections_that_fit(files, LimitSettings()) == expected


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A system whose soft limit is 64, and the hard one 1,024."""
    limits = [(64, 1024)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, wanted: limits.append(wanted))
    return limits


def test_the_soft_limit_is_raised_and_a_low_hard_one_is_said(
    few_files: list[tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, descriptors.__name__):
        assert allowed_connections(LimitSettings()) == 352
    assert few_files[-1] == (1024, 1024)
    (record,) = caplog.records
    assert "CENTRAL_LIMITS__CONNECTIONS" in record.message
    assert (vars(record)["open_files"], vars(record)["wanted"]) == (1024, 4096)


def test_nothing_is_said_when_all_fit(
    caplog: pytest.LogCaptureFixture, few_files: list[tuple[int, int]]
) -> None:
    with caplog.at_level(logging.WARNING, descriptors.__name__):
        assert allowed_connections(LimitSettings(connections=300)) == 300
    assert not caplog.records
