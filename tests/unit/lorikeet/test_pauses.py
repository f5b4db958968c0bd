"""Pauses double up to their limit."""

from __future__ import annotations

from itertools import islice

from lorikeet.pauses import doubling


def test_pauses_double_up_to_the_longest() -> None:
    assert list(islice(doubling(1.0, 5.0), 5)) == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_first_pause_beyond_the_longest_is_kept_once() -> None:
    assert list(islice(doubling(90.0, 60.0), 3)) == [90.0, 60.0, 60.0]
