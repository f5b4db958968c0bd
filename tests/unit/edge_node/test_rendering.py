"""Rendering with a toy tokenizer, one id a letter; that it agrees with vLLM is a contract test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_node.errors import SettingsError, StorageError
from edge_node.rendering import ChatFormat, Renderer, read_stop_ids

EOS, END = 1, 2


class ToyTokenizer:
    eos_token_id = EOS
    chat_template = "messages"

    def __init__(self, after_answer: str = "", refuses: bool = False) -> None:
        self._after, self._refuses = after_answer, refuses
        self.seen: list[dict[str, Any]] = []

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        special = {"\N{END OF TEXT}": END, "\N{END OF TRANSMISSION}": EOS}
        return {"input_ids": ([0] if add_special_tokens else []) + [special.get(c, 100 + ord(c)) for c in text]}

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> str:
        if self._refuses:
            raise ValueError("this template takes nothing")
        self.seen = conversation
        return "".join(
            f"<{m['role'][0]}>{m['content']}{self._after if m['role'] == 'assistant' else ''}" for m in conversation
        ) + ("<a>" if options["add_generation_prompt"] else "")


def ids(text: str) -> list[int]:
    return [100 + ord(c) for c in text]


def test_a_prompt_is_the_rendered_text_without_further_special_tokens() -> None:
    assert Renderer(ToyTokenizer(), []).prompt_ids([{"role": "user", "content": "hi"}]) == ids("<u>hi<a>")


@pytest.mark.parametrize(
    ("after", "stops", "expected"),
    [
        ("", [EOS], EOS),
        ("\N{END OF TEXT}\n", [EOS, END], END),
        ("\n", [], EOS),
        ("\N{END OF TEXT}", [], EOS),
        ("\N{END OF TEXT}<x>\N{END OF TRANSMISSION}", [END], END),
    ],
    ids=["nothing", "a stop of its own", "no stop", "no stop of the model", "eos after it, with a letter of answers"],
)
def test_an_answer_ends_as_the_template_ends_it(after: str, stops: list[int], expected: int) -> None:
    renderer = Renderer(ToyTokenizer(after), stops)
    assert renderer.answer_ids("ok") == [*ids("ok"), expected]


def test_a_template_that_leaves_answers_out_leaves_the_eos() -> None:
    class Forgetful(ToyTokenizer):
        def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> str:
            return "<s>\N{END OF TEXT}<u>"

    assert Renderer(Forgetful(), [END]).answer_ids("ok") == [*ids("ok"), EOS]


def test_a_template_that_refuses_everything_leaves_the_eos() -> None:
    assert Renderer(ToyTokenizer(refuses=True), [END]).answer_ids("ok") == [*ids("ok"), EOS]


def test_an_end_that_was_said_is_not_said_twice() -> None:
    assert Renderer(ToyTokenizer("\N{END OF TEXT}"), [END]).answer_ids("ok\N{END OF TEXT}") == [*ids("ok"), END]


def test_what_the_learner_cannot_render_is_refused_with_the_next_step() -> None:
    with pytest.raises(SettingsError, match=r"MistralRenderer.*--tokenizer-mode"):
        Renderer(ToyTokenizer(), [], ChatFormat(renderer="MistralRenderer")).prompt_ids([])
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(SettingsError, match="more than text"):
        Renderer(ToyTokenizer(), []).prompt_ids([image])


def test_the_chat_format_comes_back_and_a_damaged_one_says_what_to_do(tmp_path: Path) -> None:
    assert ChatFormat.read(tmp_path) == ChatFormat()
    written = ChatFormat("{{ x }}", True, {"enable_thinking": False}, "/tokenizer", "HfRenderer")
    written.write(tmp_path / "data")
    assert ChatFormat.read(tmp_path / "data") == written
    for content in ("{", "[]", '{"colour": 1}'):
        (tmp_path / "chat_format.json").write_text(content)
        with pytest.raises(StorageError, match=r"chat_format\.json cannot be read.*Restart the node"):
            ChatFormat.read(tmp_path)


def test_stop_ids_are_the_generation_configs_or_else_the_configs(tmp_path: Path) -> None:
    assert read_stop_ids(tmp_path) == []
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert read_stop_ids(tmp_path) == [7]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read_stop_ids(tmp_path) == [7, 9]
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_stop_ids(tmp_path) == [], "vLLM looks no further either"
