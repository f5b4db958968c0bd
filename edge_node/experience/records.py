"""The records of the experience store: what serving puts in and what learning takes out.

Pure data. Token ids are those that were served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Choice:
    """One of several answers of a request. logprobs: of each token, natural; empty: not known."""

    answer_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Interaction:
    """One finished request. model: the exact version that answered. created_at: ISO 8601, UTC."""

    id: str
    created_at: str
    model: str
    messages: list[dict[str, Any]]
    answer: str
    """What the client read: empty for an answer of tool calls alone."""
    finish_reason: str
    endpoint: str
    prompt_ids: tuple[int, ...]
    """Token ids of the prompt as the engine had it."""
    answer_ids: tuple[int, ...]
    """Token ids of the answer as made, with reasoning, tool calls and the token that ended it."""
    unusable: str = ""
    """Why nothing can be learnt from it, whatever is said of it; empty when something can."""
    choices: tuple[Choice, ...] = ()
    """All answers of a request with several, in order; `answer_ids` are those of the first."""
    user: str | None = None
    """Of the access key that it was asked with; never leaves the node."""
    episode: str | None = None
    """What the client says it belongs to: several answers that are judged together."""
    environment: str | None = None
    """What kind of work it is, in the client's words."""
    redacted: tuple[str, ...] = ()
    """Parts whose ids redaction changed: "prompt", numbers of choices ("0": `answer_ids`)."""


@dataclass(frozen=True)
class Feedback:
    """What was said of an interaction. score: 0..1. correction: the right answer."""

    interaction_id: str
    score: float | None = None
    correction: str | None = None
    comment: str | None = None
    correction_ids: tuple[int, ...] | None = ()
    """Token ids of the correction to the end of its turn; None when it is too long to be counted.
    """
    form: Literal["", "thumb", "tool_calls"] = ""
    """thumb: the score was a thumb. tool_calls: the correction is a JSON list of tool calls."""
    redacted: bool = False
    """Redaction changed the correction."""

    @property
    def kind(self) -> str:
        """The name of what it says; a correction says more than a score, a score than a comment."""
        if self.correction is not None:
            return "tool_calls" if self.form == "tool_calls" else "correction"
        if self.score is not None:
            return self.form or "score"
        return "comment"


@dataclass(frozen=True)
class EpisodeFeedback:
    """What was said of all answers of an episode. score: 0..1."""

    episode: str
    score: float | None = None
    comment: str | None = None
    form: Literal["", "thumb"] = ""


@dataclass(frozen=True)
class Teller:
    """Who gives feedback, and how."""

    user: str | None = None
    """Of the access key, which may judge the answers to that user alone; None: all answers."""
    sender: str = ""
    """Name of the access key; empty without one. An idempotency key is this sender's."""
    once: str | None = None
    """The idempotency key: what comes with it again is not written again."""
    digest: str = ""
    """Of what comes with it."""
    expects: frozenset[str] = frozenset()
    """Answers under way that are not stored yet: what is said of them waits for them."""


ANYONE = Teller()


@dataclass(frozen=True)
class Receipt:
    """Durable feedback. unusable: why nothing can be learnt from it; empty when something can.

    waits: its answer is not stored yet. answers: how many it judges.
    """

    id: str
    unusable: str
    waits: bool = False
    answers: int = 1


@dataclass(frozen=True)
class Told:
    """Feedback as it is read back. A field that was not said is None."""

    id: str
    created_at: str
    kind: str
    interactions: tuple[str, ...]
    user: str | None
    episode: str | None = None
    score: float | None = None
    correction: str | None = None
    comment: str | None = None
    said: Mapping[str, Any] = field(default_factory=dict)
    """Of a comparison: `chosen` and `rejected` (id, choice), or `scores`."""
    unusable: str = ""
    waits: bool = False
    refused: str = ""
    """Why it was not kept when its answer came."""


@dataclass(frozen=True)
class Example:
    """One thing to learn: `target_ids` is the right answer to `prompt_ids`."""

    feedback_id: str
    interaction_id: str
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    source: Literal["correction", "verified"]
    model: str


@dataclass(frozen=True)
class Thumb:
    """An answer that was only liked or disliked, in token ids."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    liked: bool


@dataclass(frozen=True)
class Counts:
    """examples: usable ones; of them `liked` were not corrected. disliked: usable, not corrected.

    unusable: reason -> number of answers that cannot be learnt; unusable_comparisons: the same of
    preferences and scored groups.
    """

    interactions: int
    feedback: int
    examples: int
    unusable: Mapping[str, int]
    liked: int = 0
    disliked: int = 0
    preferences: int = 0
    scored_groups: int = 0
    unusable_comparisons: Mapping[str, int] = field(default_factory=dict)
