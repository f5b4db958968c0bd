"""The RPC edge: equal log lines are summarised."""

from __future__ import annotations

from central.rpc import QUIET_S, Repeats


def test_the_first_is_written_and_then_one_a_minute_with_how_many() -> None:
    now = [5.0]
    repeats = Repeats(lambda: now[0])
    assert [repeats.count("call refused", "/Enroll", "BAD_TOKEN") for _ in range(1000)] == [1] + [
        0
    ] * 999
    assert repeats.count("call refused", "/Enroll", "OTHER_BASE") == 1, "another line"
    now[0] += QUIET_S
    assert repeats.count("call refused", "/Enroll", "BAD_TOKEN") == 1000
    now[0] += QUIET_S
    assert repeats.count("call refused", "/Enroll", "BAD_TOKEN") == 1
