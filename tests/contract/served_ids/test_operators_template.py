"""What vLLM renders with is what a round renders with: also the operator's own chat template."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_node.rendering import ChatFormat
from tests.contract.served_ids.running import CHAT, check, served, start
from tests.fakes.chat_templates import CHATML, PARTS, QWEN3

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize(
    ("style", "arguments"),
    [
        ("chatml", ["--chat-template", "FILE"]),
        ("chatml", ["--chat-template=FILE"]),
        ("chatml", ["--chat_template", QWEN3.replace("\n", "")]),
        (
            "chatml",
            [
                "--chat-template",
                "FILE",
                "--default-chat-template-kwargs",
                '{"enable_thinking": false}',
            ],
        ),
        (
            "chatml",
            ["--chat-template", "FILE", "--default-chat-template-kwargs.enable_thinking=false"],
        ),
        ("chatml", ["--chat-template-content-format", "openai"]),
        ("parts", ["--chat-template-content-format=string"]),
    ],
)
def test_the_operators_own_template_is_learnt(
    request: pytest.FixtureRequest, tmp_path: Path, style: str, arguments: list[str]
) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(QWEN3)
    running = start(
        request, style, *(argument.replace("FILE", str(file)) for argument in arguments)
    )
    said = [{"role": "user", "content": "Rain?"}]
    response = running.post(
        CHAT, {"messages": said, "temperature": 0, "max_tokens": 1, "return_token_ids": True}
    )
    prompt = served(response)[1]
    assert running.renderer.prompt_ids(said) == prompt
    assert check(running, CHAT, {"messages": said}, "It rains.")


def test_the_file_says_what_vllm_renders_with(request: pytest.FixtureRequest) -> None:
    for style, template, parts in (("chatml", CHATML, False), ("parts", PARTS, True)):
        running = start(request, style)
        chat_format = ChatFormat.read(running.data_dir)
        assert (chat_format.template, chat_format.parts) == (template, parts)
        assert chat_format.tokenizer == str(running.base)
