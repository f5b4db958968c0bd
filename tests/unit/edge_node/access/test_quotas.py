from __future__ import annotations

import pytest

from edge_node.access import Quotas
from edge_node.serving_settings import LimitsSettings


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_key_has_its_requests_a_minute_and_no_other_keys() -> None:
    clock = Clock()
    quotas = Quotas(LimitsSettings(requests_per_minute=3), clock)
    assert [quotas.enter("a") for _ in range(3)] == [None] * 3
    wait = quotas.enter("a")
    assert wait is not None
    assert "3 requests a minute" in wait.text
    assert wait.retry_after_s == pytest.approx(20)
    assert quotas.enter("b") is None
    clock.now += 19.9
    assert quotas.enter("a") is not None
    clock.now += 0.2
    assert quotas.enter("a") is None
    clock.now += 3600
    assert [quotas.enter("a") is None for _ in range(4)] == [True, True, True, False]


def test_requests_in_flight_are_counted_and_forgotten() -> None:
    quotas = Quotas(LimitsSettings(concurrent_requests=2))
    assert (quotas.enter("a"), quotas.enter("a"), quotas.enter("b")) == (None, None, None)
    wait = quotas.enter("a")
    assert wait is not None
    assert "2 requests of this key are in flight" in wait.text
    quotas.leave("a")
    assert quotas.enter("a") is None
    for name in ("a", "a", "b"):
        quotas.leave(name)
    assert not quotas._in_flight


def test_a_refused_request_is_not_drawn_from_the_minute() -> None:
    quotas = Quotas(LimitsSettings(requests_per_minute=2, concurrent_requests=1), Clock())
    quotas.enter("a")
    assert quotas.enter("a") is not None
    quotas.leave("a")
    assert quotas.enter("a") is None


def test_without_limits_nothing_waits() -> None:
    quotas = Quotas(LimitsSettings())
    assert {quotas.enter("") for _ in range(1000)} == {None}
