"""Sessions: what one run of an agent asked of one version, in token ids and log-probabilities.

In: the learner opens a session for a version and a run; the run's requests name it by its key. Out:
the turns of the run, once. Guarantees: nothing of a session is stored as experience, and nothing of
it is on disk; it is bounded in tokens and in time, and gone when it was read. All of its tokens are
samples of one distribution: what decides about sampling is the session's, not the request's. Only
what a schema or a forced tool call rules out is the request's.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from reprlib import repr  # the value seen, cut short
from typing import Any

from edge_node.capture import Generation, Served
from edge_node.errors import ServingError
from edge_node.serving.limits import TEXT_TOKENS, TOKENS, count_prompts, length_fields
from edge_node.serving.refusals import Unreadable

MAX_OPEN = 64
"""Sessions at once."""
MAX_TOKENS = 1 << 20
"""Tokens that a session holds, prompts and answers of all turns: 4 MB of prompts."""
BIASES: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "logit_bias": (None, {}),
    "min_tokens": (None, 0),
    "thinking_token_budget": (None, -1),
    "watermarking": (None, False),
}
"""Fields that keep the model from tokens that it would have sampled, but for these values."""


@dataclass(frozen=True)
class Session:
    """One run of an agent. `key` is its API key, a secret; `model` answers all its requests."""

    key: str
    model: str
    seed: int
    temperature: float
    max_answer_tokens: int | None
    served: Served = field(default_factory=lambda: Served(wants_logprobs=True))
    _asked: Iterator[int] = field(default_factory=itertools.count)
    """The number of each request: those that an agent sends at once have seeds of their own."""

    def bind(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        """The request as it goes to the engine; raises Unreadable for one that a session refuses.

        Several choices and beam search are refused, because the run goes on from one answer, and
        nobody knows from which.
        """
        if (asked := request.get("model")) not in (None, self.model):
            text = f"model is {asked!r}; expected {self.model!r}, the one of this session."
            raise Unreadable(text, "model")
        for name, only in (("n", 1), ("best_of", 1), ("use_beam_search", False)):
            if (given := request.get(name)) not in (None, only):
                text = f"{name} is {given!r}; expected {only!r} in a session."
                raise Unreadable(text, name)
        if (prompts := count_prompts(request.get("prompt"))) > 1:
            raise Unreadable(f"prompt has {prompts} prompts; expected one in a session.", "prompt")
        for name, without in BIASES.items():
            if (given := request.get(name)) not in without:
                text = f"{name} is {repr(given)}; expected none in a session, whose tokens are "
                raise Unreadable(f"{text}samples of the model alone.", name)
        if (held := self._tokens()) >= MAX_TOKENS:
            text = f"The session holds {held} tokens, of at most {MAX_TOKENS}. End the run."
            raise Unreadable(text)
        limits, sampling = self._limits(path, request), self._sampling(next(self._asked))
        return request | {"model": self.model} | limits | sampling

    def turns(self) -> list[dict[str, Any]]:
        """Answers that came to their end, in the order in which they were asked for."""
        return [_turn(one) for one in self.served.generations if one.finished]

    def _tokens(self) -> int:
        return sum(len(one.prompt_ids) + len(one.answer_ids) for one in self.served.generations)

    def _limits(self, path: str, request: dict[str, Any]) -> dict[str, int]:
        if self.max_answer_tokens is None:
            return {}
        most, fields = self.max_answer_tokens, length_fields(path)
        asked = {name: request[name] for name in fields if request.get(name) is not None}
        if not asked:
            unnamed = TEXT_TOKENS if fields != TOKENS and fields[0] not in request else most
            asked = {fields[0]: unnamed}
        return {
            name: limit if type(limit) is int and limit <= most else most
            for name, limit in asked.items()
        }

    def _sampling(self, number: int) -> dict[str, Any]:
        text = f"{self.seed}/{number}".encode()
        return {
            "temperature": self.temperature,
            "seed": int.from_bytes(hashlib.sha256(text).digest()[:4], "big") // 2,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
        }


class Sessions:
    """Those that are open. One event loop only."""

    def __init__(self, schedule: Callable[[float, Callable[[], object]], Any] | None = None):
        """schedule: calls back after so many seconds; the event loop's `call_later` without."""
        self._open: dict[str, Session] = {}
        self._schedule = schedule

    def open(
        self,
        model: str,
        *,
        seed: int,
        temperature: float,
        max_answer_tokens: int | None,
        lasts_s: float,
    ) -> Session:
        """A new one, which is forgotten after `lasts_s`; raises ServingError when all are taken."""
        if len(self._open) >= MAX_OPEN:
            raise ServingError(
                f"{MAX_OPEN} sessions of agents are open, the most that there are. Read one, or "
                "wait until one ends."
            )
        session = Session(secrets.token_urlsafe(32), model, seed, temperature, max_answer_tokens)
        self._open[session.key] = session
        schedule = self._schedule or asyncio.get_running_loop().call_later
        key = session.key  # the timer must not keep the tokens of a session that was read
        schedule(lasts_s, lambda: self._open.pop(key, None))
        return session

    def find(self, key: str) -> Session | None:
        """The open session with this key."""
        return self._open.get(key)

    def take(self, key: str) -> Session:
        """End a session; raises ServingError for one that is not open."""
        session = self._open.pop(key, None)
        if session is None:
            raise ServingError(
                "This session is not open: its time is over, it was read before, or vLLM was "
                "started again since."
            )
        return session


def _turn(generation: Generation) -> dict[str, Any]:
    return {
        "prompt_ids": list(generation.prompt_ids),
        "answer_ids": generation.answer_ids,
        "logprobs": generation.logprobs,
        "text_only": generation.text_only,
    }
