"""What the engine was given and gave for one request, in token ids.

In: the engine's outputs, where serving records them (`serving/internals.py`). Out: the ids of the
prompt and of each choice's answer, as the engine had them, with log-probabilities where they are
wanted. Guarantees: vLLM's request and answer stay as they are; requests that are not captured
record nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Made:
    """One choice: its ids to the token that ended it, and the natural log-probability of each."""

    answer_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class Generation:
    """One call of the engine's `generate`."""

    text_only: bool
    """False for a prompt with images, audio, video or embeddings."""
    prompt_ids: Sequence[int] = ()
    answer_ids: list[int] = field(default_factory=list)
    """Of the first choice, to the token that ended it."""
    choices: dict[int, Made] = field(default_factory=dict)
    """Of a request for several answers: all of them, by index."""
    logprobs: list[float] = field(default_factory=list)
    """Of each of `answer_ids`, natural, where `Served.wants_logprobs`."""
    finished: bool = False
    """The answer came to its end; nobody aborted it."""


@dataclass
class Served:
    """The calls of one HTTP request: one, but for several prompts or beam search.

    Of a session (serving/sessions.py): the calls of all its requests.
    """

    generations: list[Generation] = field(default_factory=list)
    wants_logprobs: bool = False


SERVED: ContextVar[Served | None] = ContextVar("served", default=None)
"""Set by the middleware around a captured request; the engine is called in its context."""
