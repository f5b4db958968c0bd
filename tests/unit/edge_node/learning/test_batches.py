"""Batches with a toy tokenizer: one id per character, `<`, `>` and `/` around roles."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from edge_node.learning.batches import IGNORED, Lesson, end_of_turn, make_rows, tokenize
from edge_node.learning.records import RoundPlan
from tests.unit.edge_node.learning.test_records import make_plan

EOS, END = 1, 2


class ToyTokenizer:
    eos_token_id = EOS

    def __init__(self, after_answer: str = "") -> None:
        self._after = after_answer

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        special = {"\N{END OF TEXT}": END}
        return {"input_ids": ([0] if add_special_tokens else []) + [special.get(c, 100 + ord(c)) for c in text]}

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool = False
    ) -> str:
        text = "".join(
            f"<{m['role'][0]}>{m['content'].upper()}{self._after if m['role'] == 'assistant' else ''}" for m in messages
        )
        return text + ("<a>" if add_generation_prompt else "")


def lesson(text: str, target: str = "yes") -> Lesson:
    return Lesson([{"role": "user", "content": text}], target)


def ids(text: str) -> list[int]:
    return [100 + ord(c) for c in text]


def plan(**changes: Any) -> RoundPlan:
    return make_plan().model_copy(update=changes)


def test_loss_is_on_the_answer_and_the_end_of_the_turn() -> None:
    row = tokenize(ToyTokenizer(), lesson("hi", "ok"), EOS)
    assert row.input_ids == [*ids("<u>HI<a>ok"), EOS]
    assert row.labels == [IGNORED] * len("<u>HI<a>") + [*ids("ok"), EOS]


def test_text_prompt_is_not_rendered_and_gets_its_special_tokens() -> None:
    row = tokenize(ToyTokenizer(), Lesson([{"role": "prompt", "content": "once"}], "upon"), EOS)
    assert row.input_ids == [0, *ids("onceupon"), EOS]


@pytest.mark.parametrize(
    ("after", "stops", "expected"), [("", [EOS], EOS), ("\N{END OF TEXT}\n", [EOS, END], END), ("\n", [], EOS)]
)
def test_turn_ends_as_the_template_ends_it(after: str, stops: list[int], expected: int) -> None:
    class Template(ToyTokenizer):
        def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
            return super().apply_chat_template(messages, **options).replace("X", "x")

    assert end_of_turn(Template(after), stops) == expected


def test_every_batch_mixes_own_and_anchor_examples_and_draws_each_once_before_any_twice() -> None:
    own, anchors = [lesson(f"own{n}") for n in range(6)], [lesson(f"anchor{n}") for n in range(5)]
    rows = make_rows(plan(steps=4, batch_own=3, batch_anchor=2), ToyTokenizer(), own, anchors, stop=EOS, max_length=99)
    texts = ["".join(chr(i - 100) for i in row.input_ids[3:-1]).split("<")[0] for row in rows]
    assert len(rows) == 20
    for batch in range(4):
        kinds = [text.startswith("OWN") for text in texts[5 * batch : 5 * batch + 5]]
        assert kinds == [True, True, True, False, False]
    assert set(Counter(text for text in texts if text.startswith("OWN")).values()) == {2}
    assert max(Counter(text for text in texts if text.startswith("ANCHOR")).values()) == 2


def test_what_the_start_release_got_wrong_is_met_more_often() -> None:
    own = [lesson(f"own{n}") for n in range(30)]
    own += [Lesson(lesson(f"hard{n}").messages, "yes", hard=True) for n in range(2)]
    arguments: dict[str, Any] = {"stop": EOS, "max_length": 99}

    def hard_in_batches(batch_hard: int, lessons: list[Lesson]) -> list[int]:
        rows = make_rows(plan(steps=4, batch_own=4, batch_hard=batch_hard), ToyTokenizer(), lessons, [], **arguments)
        texts = ["".join(chr(i - 100) for i in row.input_ids[3:-1]) for row in rows]
        assert len(texts) == 16
        return [sum(text.startswith("HARD") for text in texts[4 * b : 4 * b + 4]) for b in range(4)]

    assert min(hard_in_batches(2, own)) >= 2
    assert sum(hard_in_batches(0, own)) <= 2, "without, each is drawn once before any twice"
    assert hard_in_batches(2, own[:30]) == [0, 0, 0, 0], "nothing was wrong: ordinary examples fill the batch"


def test_rows_depend_on_the_plans_seed_alone() -> None:
    own = [lesson(f"own{n}") for n in range(20)]
    arguments: dict[str, Any] = {"stop": EOS, "max_length": 99}
    first = make_rows(plan(seed=1), ToyTokenizer(), own, [], **arguments)
    assert first == make_rows(plan(seed=1), ToyTokenizer(), own, [], **arguments)
    assert first != make_rows(plan(seed=2), ToyTokenizer(), own, [], **arguments)
    assert len(first) == 50 * 12, "without anchors a batch holds own examples only"


def test_examples_that_cannot_be_used_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    own = [lesson("good"), lesson("long" * 50), Lesson([{"role": "user", "content": None}], "broken")]
    rows = make_rows(plan(steps=2, batch_own=2), ToyTokenizer(), own, [], stop=EOS, max_length=30)
    assert {tuple(row.input_ids) for row in rows} == {(*ids("<u>GOOD<a>yes"), EOS)}
    assert "examples left out" in caplog.text
    with pytest.raises(ValueError, match="None of the round's 1 examples"):
        make_rows(plan(), ToyTokenizer(), own[1:2], [], stop=EOS, max_length=30)
