"""What the engine was given and gave for one request, in token ids.

In: the engine's outputs, where serving records them (`serving/internals.py`). Out: the ids of the
prompt and of the first choice's answer, as the engine had them. Guarantees: vLLM's request and
answer stay as they are; requests that are not captured record nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Generation:
    """One call of the engine's `generate`."""

    text_only: bool
    """False for a prompt with images, audio, video or embeddings."""
    prompt_ids: Sequence[int] = ()
    answer_ids: list[int] = field(default_factory=list)
    """Of the first choice, to the token that ended it."""


@dataclass
class Served:
    """All calls that one HTTP request made: one, unless it holds several prompts or asks for beam
    search.
    """

    generations: list[Generation] = field(default_factory=list)


SERVED: ContextVar[Served | None] = ContextVar("served", default=None)
"""Set by the middleware around a request that is captured; the engine's calls are made in the
request's context.
"""
