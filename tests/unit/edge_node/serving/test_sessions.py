from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from edge_node.capture import Generation
from edge_node.errors import ServingError
from edge_node.serving import sessions as module
from edge_node.serving.refusals import Unreadable
from edge_node.serving.sessions import Session, Sessions

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LIMITS: dict[str, Any] = {
    "seed": 7, "temperature": 1.0, "max_answer_tokens": 20, "lasts_s": 60.0
}  # fmt: skip


@pytest.fixture
def scheduled() -> list[tuple[float, Callable[[], object]]]:
    return []


@pytest.fixture
def sessions(scheduled: list[tuple[float, Callable[[], object]]]) -> Sessions:
    return Sessions(lambda delay, call: scheduled.append((delay, call)))


@pytest.fixture
def session(sessions: Sessions) -> Session:
    return sessions.open("policy@1", **LIMITS)


def generation(tokens: int = 1, **fields: Any) -> Generation:
    return Generation(True, [1] * tokens, [2], logprobs=[-0.5], **{"finished": True} | fields)


def test_the_session_decides_how_answers_are_sampled(session: Session) -> None:
    bound = session.bind(CHAT, {"temperature": 0.1, "top_p": 0.5, "seed": 3, "messages": []})
    assert bound["model"] == "policy@1"
    assert (bound["temperature"], bound["top_p"], bound["top_k"]) == (1.0, 1.0, 0)
    assert bound["messages"] == []
    at_once = [bound, *(session.bind(CHAT, {}) for _ in range(3))]
    assert len({one["seed"] for one in at_once}) == 4, "the same question at once, other answers"


def test_sessions_of_one_seed_ask_with_the_same_seeds(sessions: Sessions) -> None:
    one, other = sessions.open("a@1", **LIMITS), sessions.open("a@1", **LIMITS)
    assert one.key != other.key
    assert one.bind(CHAT, {})["seed"] == other.bind(CHAT, {})["seed"]
    assert one.bind(CHAT, {})["seed"] == other.bind(CHAT, {})["seed"]
    third = sessions.open("a@1", **LIMITS | {"seed": 8})
    assert third.bind(CHAT, {})["seed"] != sessions.open("a@1", **LIMITS).bind(CHAT, {})["seed"]


@pytest.mark.parametrize(
    ("path", "asked", "expected"),
    [
        (CHAT, {}, {"max_completion_tokens": 20}),
        (CHAT, {"max_tokens": 5}, {"max_tokens": 5}),
        (CHAT, {"max_tokens": 500}, {"max_tokens": 20}),
        (CHAT, {"max_completion_tokens": "500"}, {"max_completion_tokens": 20}),
        (CHAT, {"max_tokens": None}, {"max_completion_tokens": 20}),
        (TEXT, {}, {"max_tokens": 16}),
        (TEXT, {"max_tokens": 21}, {"max_tokens": 20}),
        (TEXT, {"max_tokens": None}, {"max_tokens": 20}),
        (TEXT, {"max_completion_tokens": 3, "max_tokens": None}, {"max_tokens": 20}),
    ],
)
def test_answers_are_no_longer_than_the_session_says(
    session: Session, path: str, asked: dict[str, Any], expected: dict[str, Any]
) -> None:
    bound = session.bind(path, asked)
    assert bound | expected == bound
    assert bound.get("max_tokens") == expected.get("max_tokens")


def test_fields_that_bias_nothing_are_fine(session: Session) -> None:
    neutral = {"min_tokens": 0, "logit_bias": {}, "bad_words": [], "thinking_token_budget": -1}
    assert session.bind(CHAT, neutral | {"n": 1})["model"] == "policy@1"


def test_a_short_session_bounds_completions_too(sessions: Sessions) -> None:
    short = sessions.open("policy@1", **LIMITS | {"max_answer_tokens": 6})
    for asked in ({}, {"max_completion_tokens": 5}, {"max_tokens": 7}):
        assert short.bind(TEXT, asked)["max_tokens"] == 6


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"model": "other"}, "model is 'other'; expected 'policy@1'"),
        ({"n": 2}, "n is 2; expected 1 in a session"),
        ({"best_of": 2}, "best_of is 2; expected 1"),
        ({"use_beam_search": True}, "use_beam_search is True; expected False"),
        ({"prompt": ["w1", "w1"]}, "prompt has 2 prompts; expected one in a session"),
        ({"logit_bias": {"5": 100}}, "logit_bias is {'5': 100}; expected none in a session"),
        ({"allowed_token_ids": [3]}, "samples of the model alone"),
        ({"min_tokens": 4}, "min_tokens is 4; expected none"),
        ({"thinking_token_budget": 0}, "thinking_token_budget is 0; expected none"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(
    session: Session, asked: dict[str, Any], expected: str
) -> None:
    with pytest.raises(Unreadable, match=expected):
        session.bind(CHAT, asked)


def test_a_session_is_bounded_in_tokens(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TOKENS", 10)
    session.served.generations.append(generation(tokens=8))
    session.bind(CHAT, {})
    session.served.generations.append(generation(tokens=1))
    with pytest.raises(Unreadable, match="holds 11 tokens, of at most 10"):
        session.bind(CHAT, {})


def test_sessions_are_bounded_in_number(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_OPEN", 2)
    first = sessions.open("a@1", **LIMITS)
    sessions.open("a@1", **LIMITS)
    with pytest.raises(ServingError, match="2 sessions of agents are open"):
        sessions.open("a@1", **LIMITS)
    sessions.take(first.key)
    sessions.open("a@1", **LIMITS)


def test_a_session_ends_when_it_is_read_or_its_time_is_over(
    sessions: Sessions, scheduled: list[tuple[float, Callable[[], object]]]
) -> None:
    read, late = sessions.open("a@1", **LIMITS), sessions.open("a@1", **LIMITS)
    assert sessions.find(read.key) is read
    assert sessions.take(read.key) is read
    assert sessions.find(read.key) is None
    with pytest.raises(ServingError, match="not open"):
        sessions.take(read.key)
    (first, end_first), (_, end_late) = scheduled
    assert first == 60.0
    end_first()  # it was read before
    end_late()
    assert sessions.find(late.key) is None


def test_nothing_of_a_session_stays_when_it_was_read(
    sessions: Sessions, scheduled: list[tuple[float, Callable[[], object]]]
) -> None:
    opened = sessions.open("a@1", **LIMITS)
    key, seen = opened.key, weakref.ref(opened)
    del opened
    sessions.take(key)
    gc.collect()
    assert seen() is None, "its end is still scheduled"
    assert len(scheduled) == 1


def test_only_answers_that_came_to_their_end_are_turns(session: Session) -> None:
    session.served.generations += [generation(), generation(finished=False)]
    assert session.turns() == [
        {"prompt_ids": [1], "answer_ids": [2], "logprobs": [-0.5], "text_only": True}
    ]
