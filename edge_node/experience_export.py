"""Experience as JSON lines that other tools read: TRL's data sets, or everything.

In: the store, a selection, the base's tokenizer where an answer's text is known in token ids alone.
Out: one JSON object for each line of a format. Guarantees: only what counts and can be learnt is a
line of `sft`, `kto`, `dpo` and `groups`; what is left out is counted with its reason. The formats
are those of TRL's "Dataset formats": conversational, or plain texts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from typing import Any

from edge_node.experience import ExperienceStore, Interaction, Told
from edge_node.experience.selection import Selection
from edge_node.experience.usable import DISLIKED, LIKED

Line = dict[str, Any]
Decode = Callable[[Sequence[int]], str]
"""Text of an answer's token ids; raises EdgeError where there is no base to read it with."""
IS_TEXT = "they answer plain texts, not messages: see --texts"
IS_CHAT = "they answer messages, not plain texts: see --texts"
NO_TEXTS = "their prompts hold more than text"


class Format(StrEnum):
    """What a line is."""

    sft = "sft"
    kto = "kto"
    dpo = "dpo"
    groups = "groups"
    all = "all"


class Export:
    """One pass over the store. `left_out`: reasons, with how many; complete after `lines`."""

    def __init__(self, store: ExperienceStore, decode: Decode, *, texts: bool = False) -> None:
        """texts: lines of plain texts, of /v1/completions, instead of messages."""
        self._store = store
        self._decode = decode
        self._texts = texts
        self.left_out: Counter[str] = Counter()

    def lines(self, form: Format, selection: Selection) -> Iterator[Line]:
        """The lines, oldest answer first. Raises EdgeError when a text cannot be read."""
        for interaction_id in self._store.ids(selection):
            interaction = self._store.interaction(interaction_id)
            if interaction is None:  # it was deleted meanwhile
                continue
            if form is Format.all:
                yield self._everything(interaction)
                continue
            for told in self._store.teaching(interaction_id):
                makes = {"preference": Format.dpo, "group": Format.groups}.get(told.kind)
                wanted = form in (Format.sft, Format.kto) if makes is None else form is makes
                if wanted and (line := self._line(form, interaction, told)) is not None:
                    yield line

    def _line(self, form: Format, of: Interaction, told: Told) -> Line | None:
        prompt = self._prompt(of)
        if prompt is None:
            return None
        line: Line = {"prompt": prompt}
        if form is Format.dpo:
            for name in ("chosen", "rejected"):
                answered = self._store.interaction(told.said[name][0])
                if answered is None:
                    return None
                line[name] = self._answer(self._text(answered, told.said[name][1]))
        elif form is Format.groups:
            line["completions"] = [
                self._answer(self._text(of, place)) for place in range(len(of.choices))
            ]
            line["scores"] = list(told.said["scores"])
        elif told.correction is not None:
            if form is Format.kto:
                return None  # it says what is right, not whether the answer was liked
            line["completion"] = self._corrected(told)
        else:
            score = told.score or 0.0
            liked = score >= LIKED
            if not (liked or (form is Format.kto and score < DISLIKED)):
                return None
            line["completion"] = self._answer(self._text(of, 0))
            line |= {"label": liked} if form is Format.kto else {}
        about = {"id": of.id, "model": of.model, "environment": of.environment or ""}
        return line | about

    def _prompt(self, of: Interaction) -> str | list[Line] | None:
        is_text = [message.get("role") for message in of.messages] == ["prompt"]
        if is_text != self._texts:
            self.left_out[IS_TEXT if is_text else IS_CHAT] += 1
            return None
        made = [_message(message) for message in of.messages]
        if any(message is None for message in made):
            self.left_out[NO_TEXTS] += 1
            return None
        messages = [message for message in made if message is not None]
        return str(messages[0]["content"]) if is_text else messages

    def _text(self, of: Interaction, choice: int) -> str:
        """What the client read, or all that the model wrote where that is empty."""
        if choice == 0 and of.answer:
            return of.answer
        return self._decode(of.choices[choice].answer_ids if of.choices else of.answer_ids)

    def _answer(self, text: str) -> str | list[Line]:
        return text if self._texts else [{"role": "assistant", "content": text}]

    def _corrected(self, told: Told) -> str | list[Line]:
        if told.kind == "tool_calls" and not self._texts:
            calls = json.loads(told.correction or "[]")
            return [{"role": "assistant", "content": "", "tool_calls": calls}]
        return self._answer(told.correction or "")

    def _everything(self, of: Interaction) -> Line:
        feedback = [
            {name: value for name, value in asdict(told).items() if value not in (None, "", {})}
            for told in self._store.said_of(of.id)
        ]
        return asdict(of) | {"verdict": self._store.verdict(of.id), "feedback": feedback}


def _message(message: Mapping[str, Any]) -> Line | None:
    """One whose content is one text, as most tools expect; None when it holds more than text."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            return None
        content = "\n".join(texts)
    if not isinstance(content, str | None):
        return None
    kept = {name: message[name] for name in ("name", "tool_call_id") if message.get(name)}
    if message.get("tool_calls"):
        kept["tool_calls"] = message["tool_calls"]
    return {"role": message.get("role"), "content": content or "", **kept}
