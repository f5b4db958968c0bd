"""A tokenizer of letters with a chat template of tools, and rules of episodes that use it.

In: text, messages. Out: ids, one a letter; END ends a message. Nothing is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from edge_node.episodes import Rules
from edge_node.rendering import Renderer

END, LETTER = 2, "\N{END OF TEXT}"


class Letters:
    """`hermes` False: its template knows no tools."""

    eos_token_id = END
    chat_template = "messages"

    def __init__(self, hermes: bool = True) -> None:
        self._hermes = hermes

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [END if c == LETTER else 100 + ord(c) for c in text]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(LETTER if one == END else chr(one - 100) for one in ids)

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> str:
        text = ""
        if self._hermes and options.get("tools"):
            names = [tool["function"]["name"] for tool in options["tools"]]
            text = f"<s>{json.dumps(names)}{LETTER}"
        for message in conversation:
            text += f"<{message['role'][0]}>{message['content']}"
            for call in message.get("tool_calls", []) if self._hermes else []:
                text += f"<tool_call>{json.dumps(call['function'])}</tool_call>"
            text += f"{LETTER}\n"
        return text + ("<a>" if options["add_generation_prompt"] else "")


def ids(text: str) -> list[int]:
    return Letters()(text)["input_ids"]


def rules(
    turns: int = 8, answer_tokens: int | None = 100, context: int = 2000, hermes: bool = True
) -> Rules:
    return Rules(Renderer(Letters(hermes), [END]), turns, answer_tokens, context)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
