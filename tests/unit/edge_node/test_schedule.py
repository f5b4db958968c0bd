from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from edge_node.schedule import is_open, read_window


def at(text: str) -> datetime:
    return datetime.fromisoformat(f"2026-11-27T{text}").replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("window", "now", "holds"),
    [
        ("22:00-06:00", "21:59:59", False),
        ("22:00-06:00", "22:00:00", True),
        ("22:00-06:00", "00:00:00", True),
        ("22:00-06:00", "05:59:59", True),
        ("22:00-06:00", "06:00:00", False),
        ("12:00-13:30 UTC", "13:29:00", True),
        ("12:00-13:30 UTC", "13:30:00", False),
        ("12:00-13:30 UTC", "11:59:00", False),
    ],
)
def test_a_window_holds_its_begin_and_not_its_end(window: str, now: str, holds: bool) -> None:
    assert read_window(window).holds(at(now)) is holds


def test_a_local_window_is_by_the_machines_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC-5")  # POSIX's sign: five hours ahead of UTC
    time.tzset()
    try:
        assert read_window("03:00-04:00 local").holds(at("22:30:00"))
        assert not read_window("03:00-04:00").holds(at("22:30:00"))
    finally:
        monkeypatch.undo()
        time.tzset()


def test_one_of_several_windows_is_enough_and_none_means_always() -> None:
    two = ["01:00-02:00", "12:00-13:00"]
    assert is_open(two, lambda: at("01:30:00"))
    assert is_open(two, lambda: at("12:30:00"))
    assert not is_open(two, lambda: at("11:00:00"))
    assert is_open([])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("22-6", "'22-6' is no window; expected HH:MM-HH:MM, for example 22:00-06:00"),
        ("24:00-06:00", "is no window"),
        ("22:00-06:60", "is no window"),
        ("22:00-06:00 CET", "is no window"),
        ("22:00-06:00\n", "is no window"),
        ("06:00-06:00", "begins when it ends"),
    ],
)
def test_what_is_no_window_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_window(text)
