"""Redaction: what should not be kept is replaced before anything is written.

In: a redactor, which finds it in a text, and interactions or feedback. Out: the same with
placeholders such as `[EMAIL]`, in texts and in token ids. Guarantees: ids are decoded, searched and
decoded again; ids in which something is still found are not kept. What was not found in stays
exactly as it was served. Runs in the writer thread, never on the event loop.
"""

from __future__ import annotations

import importlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from edge_node.capture.patterns import Patterns, Span
from edge_node.capture.token_texts import Texts
from edge_node.errors import SettingsError, StorageError
from edge_node.experience import Choice, EpisodeFeedback, Feedback, Interaction, Said
from edge_node.experience.usable import NOT_REDACTABLE

KIND = re.compile(r"[A-Z][A-Z_]{0,30}")
MOST_CHARACTERS = 1 << 22
"""Of the texts of one interaction; further ones are not searched, so they are not kept."""
TOO_LONG = "[LONG]"
FIELDS = frozenset({"role", "content", "type", "text", "name", "tool_calls", "function", "id"})
"""Names that need no search."""
TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})
"""Types of content parts that are texts. Of others, such as images, the type alone is kept."""


class Redactor(Protocol):
    """The plug-in point: EDGE_CAPTURE__REDACTION names a factory of one."""

    def find(self, text: str) -> Iterable[Span]:
        """Spans of `text` that should not be kept, in any order; they may overlap.

        Called from several threads. What it raises loses the interaction: nothing is written.
        """


def load_redactor(name: str) -> Redactor | None:
    """The redactor `default`, none for `off`, or what the factory `module:callable` makes.

    Raises SettingsError.
    """
    if name == "off":
        return None
    if name == "default":
        return Patterns()
    module, _, factory = name.partition(":")
    try:
        redactor = getattr(importlib.import_module(module), factory)()
        if not callable(getattr(redactor, "find", None)):
            raise TypeError("what it makes has no method `find`")
    except Exception as error:  # an operator's code may raise anything
        raise SettingsError(
            f"EDGE_CAPTURE__REDACTION is {name!r}, which cannot be used: {type(error).__name__}: "
            f"{error}. Expected default, off, or `module:factory` of an object with "
            "`find(text)` (docs/privacy.md)."
        ) from error
    made: Redactor = redactor
    return made


class Redaction:
    """One redactor with the texts of this node's tokens."""

    def __init__(self, redactor: Redactor | None, texts: Texts) -> None:
        self._redactor = redactor
        self._texts = texts

    def interaction(self, interaction: Interaction) -> Interaction:
        """As it may be kept; its `redacted` names the parts whose ids are not those served."""
        if self._redactor is None:
            return interaction
        budget = _Budget(self, MOST_CHARACTERS)
        answer = budget.text(interaction.answer)
        messages = budget.messages(interaction.messages)
        try:
            ids = self._interaction_ids(interaction)
        except ValueError:
            ids = {
                "prompt_ids": (),
                "answer_ids": (),
                "choices": (),
                "unusable": interaction.unusable or NOT_REDACTABLE,
            }
        return replace(interaction, messages=messages, answer=answer, **ids)

    def said(self, said: Said) -> Said:
        """Any feedback as it may be kept. Raises StorageError when the redactor raises."""
        try:
            if isinstance(said, Feedback):
                return self.feedback(said)
            if isinstance(said, EpisodeFeedback) and said.comment is not None:
                return replace(said, comment=self.text(said.comment))
        except Exception as error:  # an operator's code may raise anything, and quote what it read
            raise StorageError(
                f"The redactor of EDGE_CAPTURE__REDACTION raised {type(error).__name__}, so the "
                "feedback was not kept. Correct the redactor, and restart the node."
            ) from None
        return said

    def feedback(self, feedback: Feedback) -> Feedback:
        """Comment and correction as they may be kept; `redacted`: the correction was changed."""
        if self._redactor is None:
            return feedback
        comment = feedback.comment and self.text(feedback.comment)
        correction = feedback.correction
        if correction is not None and feedback.form == "tool_calls":
            calls = json.loads(correction)
            if (kept := _Budget(self, MOST_CHARACTERS, has_parts=False).anything(calls)) != calls:
                correction = json.dumps(kept)
        elif correction is not None:
            correction = self.text(correction)
        changed = correction != feedback.correction
        return replace(feedback, comment=comment, correction=correction, redacted=changed)

    def text(self, text: str) -> str:
        """`text` with placeholders."""
        return _put(text, self._spans(text))

    def ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        """`ids` with those of placeholders; every other token stays.

        Raises ValueError when something is found that cannot be taken out.
        """
        text = self._texts.text(ids)
        if len(text) > MOST_CHARACTERS:
            raise ValueError("the text of the tokens is too long to be searched")
        spans = self._spans(text)
        if not spans:
            return tuple(ids)
        made = self._replaced(ids, text, spans)
        if self._spans(self._texts.text(made)):
            raise ValueError("something is still found in the tokens after redaction")
        return made

    def _replaced(self, ids: Sequence[int], text: str, spans: list[Span]) -> tuple[int, ...]:
        """Each run of tokens that touches spans becomes the tokens of its text with placeholders.

        What a touched token holds beside the span stays: ` bob` of ` bob@x.org` leaves its space.
        """
        places, tokens = [0], [0]
        """Where each piece begins, in characters and in tokens, and where the last one ends."""
        for piece, number in self._texts.pieces(ids):
            places.append(places[-1] + len(piece))
            tokens.append(tokens[-1] + number)
        runs: list[tuple[int, int, list[Span]]] = []
        for span in spans:
            first, last = bisect_right(places, span.start) - 1, bisect_left(places, span.end)
            within: list[Span] = []
            if runs and first < runs[-1][1]:
                first, _, within = runs.pop()
            runs.append((first, last, [*within, span]))
        made: list[int] = []
        done = 0
        for first, last, within in runs:
            made += ids[done : tokens[first]]
            begins, end = places[first], places[last]
            made += self._texts.ids(_put(text[begins:end], within, begins))
            done = tokens[last]
        return (*made, *ids[done:])

    def _interaction_ids(self, interaction: Interaction) -> dict[str, Any]:
        prompt, answer = self.ids(interaction.prompt_ids), self.ids(interaction.answer_ids)
        choices = tuple(
            replace(one, answer_ids=self.ids(one.answer_ids)) for one in interaction.choices
        )
        redacted = ["prompt"] if prompt != interaction.prompt_ids else []
        if answer != interaction.answer_ids:
            redacted.append("0")
        for number, (before, after) in enumerate(zip(interaction.choices, choices, strict=True)):
            if number and before != after:
                redacted.append(str(number))
        if redacted:  # those of other tokens, or after another prompt
            choices = tuple(Choice(one.answer_ids) for one in choices)
        return {
            "prompt_ids": prompt,
            "answer_ids": answer,
            "choices": choices,
            "redacted": tuple(redacted),
        }

    def _spans(self, text: str) -> list[Span]:
        """Spans of `text` in order, without overlaps. Raises ValueError for impossible ones."""
        merged: list[Span] = []
        for span in sorted(self._redactor.find(text) if self._redactor else ()):
            if not (0 <= span.start < span.end <= len(text) and KIND.fullmatch(span.kind)):
                raise TypeError(
                    f"The redactor found characters {span.start} to {span.end} of {len(text)}, "
                    f"kind {span.kind!r}; expected a span inside the text and a kind of capitals."
                )
            if merged and span.start < merged[-1].end:
                last = merged.pop()
                span = Span(last.start, max(last.end, span.end), last.kind)
            merged.append(span)
        return merged


def _put(text: str, spans: Iterable[Span], begins: int = 0) -> str:
    """`text` with placeholders for `spans`, in order; they count from `begins` before it."""
    pieces, done = [], 0
    for span in spans:
        pieces += [text[done : span.start - begins], f"[{span.kind}]"]
        done = span.end - begins
    return "".join([*pieces, text[done:]])


class _Budget:
    """The texts of one interaction, of which only so many characters are searched."""

    def __init__(self, redaction: Redaction, characters: int, *, has_parts: bool = True) -> None:
        """has_parts: a `type` in a list says what is no text. Of other JSON it is a word."""
        self._redaction = redaction
        self._left = characters
        self._has_parts = has_parts

    def text(self, text: str) -> str:
        self._left -= len(text)
        return self._redaction.text(text) if self._left >= 0 else TOO_LONG

    def messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self.anything(message) for message in messages]

    def anything(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self._part(item) for item in value]
        if isinstance(value, dict):
            return {
                name if name in FIELDS else self.text(str(name)): self.anything(item)
                for name, item in value.items()
            }
        if isinstance(value, int | float) and not isinstance(value, bool):
            # A number may be a card's or a phone's.
            written = str(value)
            return value if self.text(written) == written else self.text(written)
        return value

    def _part(self, part: Any) -> Any:
        kind = part.get("type") if self._has_parts and isinstance(part, dict) else None
        if isinstance(kind, str) and "role" not in part and kind not in TEXT_PARTS | {"function"}:
            return {"type": self.text(kind)}
        return self.anything(part)
