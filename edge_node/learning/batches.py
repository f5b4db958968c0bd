"""Examples -> token ids and fixed batches.

In: messages and target answers, a tokenizer, a plan. Out: `TokenRow`s in training order, the loss on the answer only.
The ids are those that vLLM sees and samples: the rendered prompt, the answer, and the token that ends the turn. The
same plan and examples give the same rows.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from edge_node.learning.records import RoundPlan

log = logging.getLogger(__name__)
T = TypeVar("T")

IGNORED = -100
"""Label of a token without loss (the convention of torch and transformers)."""


@dataclass(frozen=True)
class Lesson:
    """A conversation and the answer to learn."""

    messages: Sequence[Mapping[str, Any]]
    target: str
    hard: bool = False
    """A correction of an answer by the release that the round starts from."""


@dataclass(frozen=True)
class TokenRow:
    """input_ids and labels, int, equally long; labels are IGNORED on the prompt."""

    input_ids: list[int]
    labels: list[int]


def tokenize(tokenizer: Any, lesson: Lesson, end_of_turn: int) -> TokenRow:
    """Prompt ids as vLLM makes them, then the target's, then `end_of_turn`; the loss is on the latter two."""
    if [message["role"] for message in lesson.messages] == ["prompt"]:  # a text prompt of /v1/completions
        prompt = list(tokenizer(lesson.messages[0]["content"])["input_ids"])
    else:
        text = tokenizer.apply_chat_template(list(lesson.messages), add_generation_prompt=True, tokenize=False)
        prompt = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    answer = [*tokenizer(lesson.target, add_special_tokens=False)["input_ids"], end_of_turn]
    return TokenRow(prompt + answer, [IGNORED] * len(prompt) + answer)


def end_of_turn(tokenizer: Any, stop_ids: Collection[int]) -> int:
    """Id that ends an answer: the stop token that the chat template writes after one, else the tokenizer's eos.

    They differ for some models (Gemma: <end_of_turn> and <eos>); a model trained on the wrong one never stops.
    """
    answer = "x"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}], tokenize=False
        )
    except Exception:  # a template may refuse anything by raising; then there is nothing to learn from it
        text = ""
    after = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    stops = {*stop_ids, tokenizer.eos_token_id}
    return int(next((token for token in after if token in stops), tokenizer.eos_token_id))


def make_rows(
    plan: RoundPlan, tokenizer: Any, own: Sequence[Lesson], anchors: Sequence[Lesson], *, stop: int, max_length: int
) -> list[TokenRow]:
    """All rows of the round in order: `steps` batches of batch_own own and batch_anchor anchor rows.

    Of the own rows, batch_hard come from the hard examples alone, where there are any (prioritised replay,
    arXiv:1511.05952, with two classes instead of priorities). Within each kind every example is drawn once before any
    is drawn again. An example that cannot be rendered or is longer than
    `max_length` is left out, and counted in the log. Raises ValueError when no own example is left.
    """
    own_rows = _usable(tokenizer, own, stop, max_length)
    if not own_rows:
        raise ValueError(
            f"None of the round's {len(own)} examples can be trained on (at most {max_length} tokens each)."
        )
    anchor_rows = _usable(tokenizer, anchors, stop, max_length) if plan.batch_anchor else []
    hard_rows = _usable(tokenizer, [lesson for lesson in own if lesson.hard], stop, max_length)
    batch_hard = plan.batch_hard if hard_rows else 0
    own_stream = _shuffled_forever(own_rows, random.Random(f"{plan.seed}/own"))
    hard_stream = _shuffled_forever(hard_rows, random.Random(f"{plan.seed}/hard"))
    anchor_stream = _shuffled_forever(anchor_rows, random.Random(f"{plan.seed}/anchor"))
    rows: list[TokenRow] = []
    for _ in range(plan.steps):
        rows.extend(next(hard_stream) for _ in range(batch_hard))
        rows.extend(next(own_stream) for _ in range(plan.batch_own - batch_hard))
        if anchor_rows:
            rows.extend(next(anchor_stream) for _ in range(plan.batch_anchor))
    return rows


def _usable(tokenizer: Any, lessons: Sequence[Lesson], stop: int, max_length: int) -> list[TokenRow]:
    rows = []
    for lesson in lessons:
        try:
            row = tokenize(tokenizer, lesson, stop)
        except Exception:  # a client's messages may be anything; the chat template decides, and raises what it likes
            continue
        if len(row.input_ids) <= max_length:
            rows.append(row)
    if len(rows) < len(lessons):
        log.warning("examples left out", extra={"left_out": len(lessons) - len(rows), "of": len(lessons)})
    return rows


def _shuffled_forever(items: Sequence[T], generator: random.Random) -> Iterator[T]:
    while True:
        yield from generator.sample(items, len(items))
