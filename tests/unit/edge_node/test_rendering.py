"""Rendering with a toy tokenizer, one id a letter; that it agrees with vLLM is a contract test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trl

from edge_node.environments.tools import tool_schemas
from edge_node.errors import SettingsError, StorageError
from edge_node.rendering import ChatFormat, Renderer, read_stop_ids
from tests.fakes.letters import END as LETTERS_END
from tests.fakes.letters import LETTER, Letters
from tests.fakes.letters import ids as letters
from tests.fakes.safe_environment import Safe

EOS, END = 1, 2


class ToyTokenizer:
    eos_token_id = EOS
    chat_template = "messages"

    def __init__(self, after_answer: str = "", refuses: bool = False) -> None:
        self._after, self._refuses = after_answer, refuses
        self.seen: list[dict[str, Any]] = []

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        special = {"\N{END OF TEXT}": END, "\N{END OF TRANSMISSION}": EOS}
        return {
            "input_ids": ([0] if add_special_tokens else [])
            + [special.get(c, 100 + ord(c)) for c in text]
        }

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> str:
        if self._refuses:
            raise ValueError("this template takes nothing")
        self.seen = conversation
        return "".join(
            f"<{m['role'][0]}>{m['content']}{self._after if m['role'] == 'assistant' else ''}"
            for m in conversation
        ) + ("<a>" if options["add_generation_prompt"] else "")


def ids(text: str) -> list[int]:
    return [100 + ord(c) for c in text]


def test_a_prompt_is_the_rendered_text_without_further_special_tokens() -> None:
    assert Renderer(ToyTokenizer(), []).prompt_ids([{"role": "user", "content": "hi"}]) == ids(
        "<u>hi<a>"
    )


@pytest.mark.parametrize(
    ("after", "stops", "expected"),
    [
        ("", [EOS], EOS),
        ("\N{END OF TEXT}\n", [EOS, END], END),
        ("\n", [], EOS),
        ("\N{END OF TEXT}", [], EOS),
        ("\N{END OF TEXT}<x>\N{END OF TRANSMISSION}", [END], END),
    ],
    ids=[
        "nothing",
        "a stop of its own",
        "no stop",
        "no stop of the model",
        "eos after it, with a letter of answers",
    ],
)
def test_an_answer_ends_as_the_template_ends_it(
    after: str, stops: list[int], expected: int
) -> None:
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
    assert Renderer(ToyTokenizer("\N{END OF TEXT}"), [END]).answer_ids("ok\N{END OF TEXT}") == [
        *ids("ok"),
        END,
    ]


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
        with pytest.raises(
            StorageError, match=r"chat_format\.json cannot be read.*Restart the node"
        ):
            ChatFormat.read(tmp_path)


def test_stop_ids_are_the_generation_configs_or_else_the_configs(tmp_path: Path) -> None:
    assert read_stop_ids(tmp_path) == []
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert read_stop_ids(tmp_path) == [7]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read_stop_ids(tmp_path) == [7, 9]
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_stop_ids(tmp_path) == [], "vLLM looks no further either"


TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOOLS = tool_schemas(Safe())


class Templated(Letters):
    """Renders a real template; its end of a turn is one token."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return super().__call__(text.replace("<|im_end|>", LETTER))

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        del options["tokenize"], options["continue_final_message"]
        (rendered,), _ = render_jinja_template([conversation], **options)
        return str(rendered)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_what_follows_calls_is_what_a_real_template_writes(name: str) -> None:
    renderer = Renderer(
        Templated(), [LETTERS_END], ChatFormat((TEMPLATES / f"{name}.jinja").read_text())
    )
    renderer.expect_tools(TOOLS)
    messages = [{"role": "user", "content": "open <|im_end|> it"}]
    results = [
        {"role": "tool", "name": f"t{n}", "tool_call_id": f"c{n}", "content": f"r{n}"}
        for n in range(2)
    ]
    assert renderer.after_calls_ids(messages, results, TOOLS) == letters(
        "\n<|im_start|>user\n<tool_response>\nr0\n</tool_response>\n<tool_response>\nr1\n"
        f"</tool_response>{LETTER}\n<|im_start|>assistant\n"
    )
    assert renderer.prompt_ids(messages, TOOLS) != renderer.prompt_ids(messages)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (Letters(hermes=False), "does not show the tools and calls in the Hermes format"),
        (ToyTokenizer(refuses=True), "refuses messages of tools with ValueError"),
    ],
)
def test_a_template_without_tools_is_refused_with_the_next_step(
    tokenizer: Any, expected: str
) -> None:
    with pytest.raises(SettingsError, match=f"{expected}.*--chat-template"):
        Renderer(tokenizer, [END]).expect_tools(TOOLS)
    Renderer(Letters(), [LETTERS_END]).expect_tools(TOOLS)


def test_a_template_that_does_not_end_an_answer_is_refused() -> None:
    messages = [{"role": "user", "content": "x"}]
    results = [{"role": "tool", "name": "t", "tool_call_id": "c", "content": "r"}]
    with pytest.raises(SettingsError, match="does not end an answer that calls tools"):
        Renderer(ToyTokenizer(), [END]).after_calls_ids(messages, results, TOOLS)


def test_the_text_of_an_answer_is_without_the_token_that_ended_it() -> None:
    renderer = Renderer(Letters(), [LETTERS_END])
    assert renderer.answer_text([*letters("ab"), LETTERS_END]) == "ab"
    assert renderer.answer_text([LETTERS_END, *letters("ab")]) == f"{LETTER}ab"
    assert renderer.answer_text([]) == ""
