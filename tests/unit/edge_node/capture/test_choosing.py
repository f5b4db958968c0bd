from __future__ import annotations

from typing import Any

import pytest

from edge_node.capture.choosing import REASONS, is_kept, reason_of
from edge_node.experience_settings import CaptureSettings

OFF = [(b"x-lorikeet-capture", b"Off")]


class Key:
    def __init__(self, capture: bool) -> None:
        self.capture = capture


def choose(
    headers: list[tuple[bytes, bytes]] | None = None, key: Key | None = None, **settings: Any
) -> tuple[bool, str]:
    """Whether it is kept, and what feedback on it says if not."""
    request: dict[str, Any] = {}
    kept = is_kept(
        CaptureSettings(**settings), key, {"path": "/v1/x", "headers": headers or []}, request
    )
    return kept, reason_of(f"chatcmpl-{request['request_id']}") if request else ""


def test_what_keeps_an_answer_out() -> None:
    assert choose() == (True, "")
    assert choose(key=Key(True)) == (True, "")
    assert choose(key=Key(False)) == (False, REASONS["key"])
    assert choose(OFF) == (False, REASONS["request"])
    assert choose([*OFF, (b"x-lorikeet-capture", b"on")]) == (False, REASONS["request"])
    assert choose(enabled=False) == (False, REASONS["node"])
    assert choose(sample=0.0) == (False, REASONS["sample"])


def test_a_sample_is_a_share_of_the_answers() -> None:
    kept = sum(choose(sample=0.25)[0] for _ in range(2000))
    assert 400 < kept < 600


def test_an_episode_is_kept_whole_or_not_at_all() -> None:
    for number in range(50):
        headers = [(b"x-lorikeet-episode", str(number).encode())]
        assert len({choose(headers, sample=0.5) for _ in range(5)}) == 1
    shares = [
        choose([(b"x-lorikeet-episode", b"episode-%d" % number)], sample=0.5)[0]
        for number in range(1000)
    ]
    assert 400 < sum(shares) < 600


@pytest.mark.parametrize("name", ["chatcmpl-1", "cmpl-unkept-key-12", "unkept-other-" + "0" * 32])
def test_other_ids_say_nothing(name: str) -> None:
    assert reason_of(name) == ""


@pytest.mark.parametrize("prefix", ["chatcmpl-", "cmpl-", "resp_", "msg_"])
def test_the_id_says_why_whatever_the_route_makes_of_it(prefix: str) -> None:
    assert reason_of(f"{prefix}unkept-key-{'0' * 32}-0") == REASONS["key"]
