from __future__ import annotations

from typing import Any

import pytest

from edge_node.serving.limits import bound
from edge_node.serving.refusals import Unreadable
from edge_node.serving_settings import LimitsSettings

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LIMITS = LimitsSettings(choices=8, prompts=4, answers=16, max_tokens=100)


@pytest.mark.parametrize(
    ("request_", "field", "text"),
    [
        (
            {"n": 10_000},
            "n",
            "n is 10000; this node takes at most 8 (EDGE_SERVING__LIMITS__CHOICES)",
        ),
        ({"n": "10000"}, "n", "n is '10000'"),
        ({"n": "1_0"}, "n", "at most 8"),
        ({"n": 9.0}, "n", "n is 9.0"),
        ({"best_of": 9}, "best_of", "best_of is 9"),
        ({"max_tokens": 101}, "max_tokens", "at most 100 (EDGE_SERVING__LIMITS__MAX_TOKENS)"),
        ({"max_completion_tokens": 101}, "max_completion_tokens", "is 101"),
        ({"max_tokens": 5, "max_completion_tokens": 101}, "max_completion_tokens", "is 101"),
        ({"prompt": ["a"] * 5}, "prompt", "has 5 prompts; this node takes at most 4"),
        ({"prompt": [[1, 2]] * 5}, "prompt", "has 5 prompts"),
        ({"prompt": ["a"] * 3, "prompt_embeds": ["b"] * 2}, "prompt", "has 5 prompts"),
        ({"prompt": ["a"] * 4, "n": 5}, "n", "is 5 for each of 4 prompts: 20 answers"),
    ],
)
def test_what_is_too_much_is_named(request_: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(Unreadable) as caught:
        bound(TEXT, request_, LIMITS, 512, 4096)
    assert text in str(caught.value)
    assert caught.value.param == field


@pytest.mark.parametrize(
    "request_",
    [
        {"n": 8, "best_of": 8, "max_tokens": 100},
        {"n": None, "max_tokens": 1},
        {"n": "eight", "max_tokens": [], "best_of": {}},
        {"prompt": list(range(500)), "max_tokens": 1},
        {"prompt": [1.0] * 500, "max_tokens": 1},
        {"prompt": "a" * 5000, "max_tokens": 1},
        {"prompt": [], "max_tokens": 1},
        {"prompt": ["a"] * 4, "n": 4, "max_tokens": 1},
    ],
    ids=str,
)
def test_the_rest_is_vllms_to_judge(request_: dict[str, Any]) -> None:
    before = dict(request_)
    bound(TEXT, request_, LIMITS, 512, 4096)
    assert request_ == before


def test_a_request_without_a_length_gets_the_largest() -> None:
    for path, request in ((CHAT, {}), (CHAT, {"max_tokens": None}), (TEXT, {"max_tokens": None})):
        asked: dict[str, Any] = dict(request)
        bound(path, asked, LIMITS, 512, 4096)
        assert asked == {"max_tokens": 100}
    shorter: dict[str, Any] = {}
    bound(CHAT, shorter, LIMITS, 64, 4096)  # vLLM refuses more than the context
    assert shorter == {}
    bound(CHAT, shorter, LimitsSettings(), 512, 4096)
    assert shorter == {}


@pytest.mark.parametrize(
    ("request_", "most", "expected"),
    [
        ({}, 100, 16),
        ({}, 8, 8),
        ({"max_tokens": 5}, 8, 5),
        ({"max_completion_tokens": 5}, 100, 16),
        ({"max_completion_tokens": 5, "max_tokens": None}, 100, 100),
    ],
)
def test_completions_have_a_length_of_their_own(
    request_: dict[str, Any], most: int, expected: int
) -> None:
    """vLLM's is 16; it knows no `max_completion_tokens` there."""
    bound(TEXT, request_, LIMITS.model_copy(update={"max_tokens": most}), 512, 4096)
    assert request_["max_tokens"] == expected
