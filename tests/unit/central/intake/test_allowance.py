"""How many updates a node may have admitted."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest

from central.errors import Reason, Refused
from central.intake.allowance import Allowance


def admit(allowance: Allowance, node_id: str) -> None:
    allowance.expect_one(node_id)
    with allowance.one(node_id):
        pass


def test_a_node_may_have_so_many_updates_in_an_hour() -> None:
    now = [1e6]
    allowance = Allowance(4, lambda: now[0])
    for _ in range(4):
        admit(allowance, "a")
    with pytest.raises(Refused, match=r"had 4 updates .* Try again in 900 s") as caught:
        allowance.expect_one("a")
    assert caught.value.reason == Reason.TOO_MANY_UPDATES
    allowance.expect_one("b")
    now[0] += 900
    admit(allowance, "a")
    now[0] += 899
    with pytest.raises(Refused):
        allowance.expect_one("a")
    now[0] += 3600
    for _ in range(4):
        admit(allowance, "a")


def test_an_update_counts_while_it_is_being_admitted() -> None:
    allowance = Allowance(2, lambda: 0.0)
    with ExitStack() as admitting:
        for _ in range(2):
            admitting.enter_context(allowance.one("a"))
        with pytest.raises(Refused, match="Try again in 1800 s"), allowance.one("a"):
            raise AssertionError
    with pytest.raises(Refused), allowance.one("a"):
        raise AssertionError


def test_what_is_not_admitted_does_not_count() -> None:
    allowance = Allowance(1, lambda: 0.0)
    for _ in range(3):
        with pytest.raises(ValueError, match="damaged"), allowance.one("a"):
            raise ValueError("damaged")
    admit(allowance, "a")


def test_two_threads_count_two() -> None:
    """The clock lets the other thread go first, between what is read and what is written."""
    others: list[threading.Thread] = []

    def clock() -> float:
        if not others:
            others.append(threading.Thread(target=admit, args=(allowance, "a")))
            others[0].start()
            others[0].join(0.2)
        return 0.0

    allowance = Allowance(2, clock)
    with allowance.one("a"):
        pass
    others[0].join()
    with pytest.raises(Refused):
        allowance.expect_one("a")
