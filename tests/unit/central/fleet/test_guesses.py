"""Refused callers of enrolment wait: per address, all together, in bounded memory."""

from __future__ import annotations

import pytest

from central.fleet.guesses import (
    ADDRESSES,
    ASK_S,
    FREE,
    FREE_OF_ALL,
    LONGEST_S,
    RATE,
    Guesses,
    address_of,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_guesses() -> tuple[Guesses, Clock]:
    clock = Clock()
    return Guesses(clock), clock


def test_the_first_refusals_come_at_once_and_further_ones_a_second_apart() -> None:
    guesses, clock = make_guesses()
    assert [guesses.pause_s("ipv4:10.0.0.1:5") for _ in range(FREE + 3)] == [0.0] * FREE + [
        1.0,
        2.0,
        3.0,
    ]
    assert guesses.pause_s("ipv4:10.0.0.2:5") == 0.0, "another address"
    clock.now += 60
    assert guesses.pause_s("ipv4:10.0.0.1:6") == 0.0, "it has been quiet"


async def test_only_who_was_refused_too_often_waits_before_it_is_heard() -> None:
    slept: list[float] = []

    async def sleep(pause_s: float) -> None:
        slept.append(pause_s)

    clock = Clock()
    guesses = Guesses(clock, sleep)
    for _ in range(FREE):
        await guesses.wait_to_ask("ipv4:10.0.0.1:5")
        await guesses.wait("ipv4:10.0.0.1:5")
    assert slept == []
    await guesses.wait("ipv4:10.0.0.1:5")
    await guesses.wait_to_ask("ipv4:10.0.0.1:5")
    await guesses.wait_to_ask("ipv4:10.0.0.2:5")
    assert slept == [1.0, 1.0], "not the other address"
    for _ in range(100):
        guesses.pause_s("ipv4:10.0.0.1:5")
    await guesses.wait_to_ask("ipv4:10.0.0.1:6")
    assert slept[2:] == [ASK_S], "a node with the right token waits no longer"
    clock.now += LONGEST_S + 1
    await guesses.wait_to_ask("ipv4:10.0.0.1:6")
    assert slept[3:] == []


def test_no_answer_is_later_than_a_node_waits() -> None:
    guesses, _ = make_guesses()
    assert max(guesses.pause_s("ipv4:10.0.0.1:5") for _ in range(10_000)) == LONGEST_S


def test_many_addresses_share_one_pace_and_little_memory() -> None:
    guesses, clock = make_guesses()
    at_once, number = 0, 0
    for _ in range(100):  # ten seconds
        for _ in range(200):
            number += 1
            at_once += (
                guesses.pause_s(f"ipv4:10.{number >> 16}.{number >> 8 & 255}.{number & 255}:5")
                == 0.0
            )
        clock.now += 0.1
    assert at_once <= FREE_OF_ALL + 1
    assert len(guesses._due) <= ADDRESSES + 1
    assert RATE <= 10


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:127.0.0.1:5000", "127.0.0.1"),
        ("ipv6:%5B::1%5D:5000", "::"),
        ("ipv6:[2001:db8:1:2:3::4]:5", "2001:db8:1:2::"),
        ("ipv6:%5B2001:db8:1:2:ffff::5%5D:9", "2001:db8:1:2::"),
        ("ipv6:%5Bfe80::1%25eth0%5D:9", "fe80::"),
        ("ipv6:[::ffff:10.0.0.1]:9", "10.0.0.1"),
        ("unix:", "unix:"),
        ("", ""),
    ],
)
def test_an_address_is_a_site(peer: str, address: str) -> None:
    assert address_of(peer) == address
