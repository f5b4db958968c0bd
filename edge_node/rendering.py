"""Messages -> token ids as this node's vLLM makes them, for anchors and environment tasks.

In: a tokenizer, and the chat format that vLLM said it uses (`chat_format.json` in the data
directory). Out: prompt ids, answer ids, ids of tool results. Guarantees: for text messages the ids
are those that vLLM makes of them (a contract test compares). What was served is never rendered
again: its ids are in the experience store. Imports no library by itself.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edge_node.disk import read_json
from edge_node.errors import SettingsError, StorageError

FILE_NAME = "chat_format.json"
HF_RENDERER = "HfRenderer"
"""vLLM's renderer that this module agrees with: a Jinja template, a Hugging Face tokenizer."""
PROBE = "qzxprobe"
"""An answer that no template and no special token holds a part of."""
RESERVED = frozenset({"tokenize", "return_dict", "chat_template", "tools"})
"""Template options that are this module's to set."""
TOOLS_NEXT = (
    "An environment with tools needs a template that shows tools and writes calls in the Hermes "
    "format, <tool_call>{...}</tool_call>: name one with --chat-template in "
    "EDGE_SERVING__EXTRA_ARGS, or take the environment out of EDGE_ENVIRONMENTS."
)
AS_TEXT = "Send what the model should have written as `correction` instead."


@dataclass(frozen=True)
class ChatFormat:
    """How vLLM turns messages into a prompt, as it resolved the operator's arguments itself."""

    template: str | None = None
    """The Jinja template; None: the tokenizer's own."""
    parts: bool = False
    """True: the template reads content as parts (vLLM's format `openai`), not as a string."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Template variables that every request has: vLLM's --default-chat-template-kwargs."""
    tokenizer: str | None = None
    """Directory of the tokenizer; None: the base model's."""
    renderer: str = HF_RENDERER
    """Class of vLLM's renderer."""

    def write(self, data_dir: Path) -> None:
        """Replaces the file whole; vLLM writes it at every start. Raises OSError."""
        data_dir.mkdir(parents=True, exist_ok=True)
        partial = data_dir / f"{FILE_NAME}.partial"
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(data_dir / FILE_NAME)

    @classmethod
    def read(cls, data_dir: Path) -> ChatFormat:
        """What vLLM wrote at its last start, else the tokenizer's template; raises StorageError."""
        path = data_dir / FILE_NAME
        try:
            return cls(**read_json(path))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(
                f"{path} cannot be read: {error}. Restart the node: vLLM writes it anew."
            ) from error


class Renderer:
    """One tokenizer with one chat format; usable from several threads when the tokenizer is."""

    def __init__(
        self, tokenizer: Any, stop_ids: Collection[int], chat: ChatFormat | None = None
    ) -> None:
        """stop_ids: tokens that end an answer beside the tokenizer's eos (`read_stop_ids`)."""
        self.tokenizer = tokenizer
        self._stop_ids = {*stop_ids, tokenizer.eos_token_id}
        self._chat = chat or ChatFormat()

    def prompt_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of the prompt of a chat request with these messages and tools, and no further fields.

        Raises:
            SettingsError: vLLM renders with something else than a chat template, or a content holds
                more than text.
            Exception: whatever the template raises on messages that it refuses.
        """
        if self._chat.renderer != HF_RENDERER:
            raise SettingsError(
                f"vLLM renders prompts with {self._chat.renderer}; the learner knows Jinja chat "
                "templates only. Take --tokenizer-mode out of EDGE_SERVING__EXTRA_ARGS."
            )
        return self._encode(self._render(messages, tools, add_generation_prompt=True))

    def after_calls_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        results: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
    ) -> list[int]:
        """Ids between the token that ends an answer with tool calls, and the next answer.

        They are what the template writes after the end of an answer to `messages`, when `results`
        (messages of role `tool`) and a generation prompt follow. The answer itself is a stub: what
        was sampled is not rendered.

        Raises SettingsError when the template does not end the answer.
        """
        ended = self._encode(self._render(messages, tools, add_generation_prompt=False))
        whole = [*messages, _calling(results), *results]
        ids = self._encode(self._render(whole, tools, add_generation_prompt=True))
        ends = [place for place, token in enumerate(ids) if token == self.end_of_turn]
        number = ended.count(self.end_of_turn)
        if len(ends) <= number:
            raise SettingsError(
                "The chat template does not end an answer that calls tools, so their results "
                f"cannot be told. {TOOLS_NEXT}"
            )
        return ids[ends[number] + 1 :]

    def expect_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Raises SettingsError unless the template shows tools, calls (Hermes) and results."""
        result = {"role": "tool", "name": "call", "tool_call_id": "call-1-0", "content": PROBE}
        messages = [{"role": "user", "content": "?"}, _calling([result]), result]
        try:
            text = self._render(messages, tools, add_generation_prompt=True)
        except SettingsError:
            raise
        except Exception as error:  # the template decides what it takes, and raises what it likes
            raise SettingsError(
                f"The chat template refuses messages of tools with {type(error).__name__}. "
                f"{TOOLS_NEXT}"
            ) from error
        signs = {
            "the tools": json.dumps(tools[0]["function"]["name"])[1:-1],
            "calls in the Hermes format": "<tool_call>",
            "their results": PROBE,
        }
        if missing := [what for what, sign in signs.items() if sign not in text]:
            raise SettingsError(
                f"The chat template does not show {' and '.join(missing)}. {TOOLS_NEXT}"
            )

    def answer_text(self, ids: Sequence[int]) -> str:
        """Text of a sampled answer, special tokens included, but for the one that ended it."""
        if ids and ids[-1] in self._stop_ids:
            ids = ids[:-1]
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer with this text, to its end: the last one is `end_of_turn`."""
        ids = self._encode(text)
        return ids if ids and ids[-1] == self.end_of_turn else [*ids, self.end_of_turn]

    def calls_ids(self, calls: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of an answer that is these tool calls and nothing else, to its end.

        They are what the template writes of them, in the model's own format.

        Raises ValueError when the template does not show them.
        """
        question = {"role": "user", "content": "?"}
        stub = {"role": "assistant", "content": PROBE}
        calling = {"role": "assistant", "content": "", "tool_calls": list(calls)}
        try:
            before, found, _ = self._render(
                [question, stub], None, add_generation_prompt=False
            ).rpartition(PROBE)
            text = self._render([question, calling], None, add_generation_prompt=False)
        except Exception as error:  # the template decides what it takes, and raises what it likes
            raise ValueError(
                f"The chat template of this model refuses these tool calls: {error}. {AS_TEXT}"
            ) from error
        names = [json.dumps(call["function"]["name"])[1:-1] for call in calls]
        if not found or not text.startswith(before) or any(name not in text for name in names):
            raise ValueError(f"The chat template of this model shows no tool calls. {AS_TEXT}")
        ids = self._encode(text[len(before) :])
        ends = (place for place, token in enumerate(ids) if token in self._stop_ids)
        return [*ids[: next(ends, len(ids))], self.end_of_turn]

    @cached_property
    def end_of_turn(self) -> int:
        """The stop token that the chat template writes after an answer, else the tokenizer's eos.

        They differ for some models (Gemma: <end_of_turn> and <eos>); a model trained on the wrong
        one never stops.
        """
        messages = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
        try:
            text = self._render(messages, None, add_generation_prompt=False)
        except Exception:  # a template may refuse anything by raising, and completions need none
            text = ""
        _, found, after = text.rpartition(PROBE)
        ids = self._encode(after) if found else []
        return int(
            next((token for token in ids if token in self._stop_ids), self.tokenizer.eos_token_id)
        )

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        conversation = [_message(message, parts=self._chat.parts) for message in messages]
        template = self._chat.template
        if any(message["role"] == "developer" for message in conversation):
            known = template if template is not None else str(self.tokenizer.chat_template)
            if '"developer"' not in known and "'developer'" not in known:
                conversation = _one_system_message(conversation)
        options = {
            name: value for name, value in self._chat.options.items() if name not in RESERVED
        }
        options |= {"add_generation_prompt": add_generation_prompt, "continue_final_message": False}
        if tools:
            options["tools"] = list(tools)
        return str(
            self.tokenizer.apply_chat_template(
                conversation, chat_template=template, tokenize=False, **options
            )
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def load_renderer(base: Path, chat: ChatFormat | None = None) -> Renderer:
    """The renderer of the base model in this directory (loads transformers)."""
    from transformers import AutoTokenizer

    chat = chat or ChatFormat()
    tokenizer = AutoTokenizer.from_pretrained(chat.tokenizer or base, local_files_only=True)
    return Renderer(tokenizer, read_stop_ids(base), chat)


def read_stop_ids(base: Path) -> list[int]:
    """Ids that end an answer, from the model's generation config, else from its config."""
    for name in ("generation_config.json", "config.json"):
        try:
            ids = json.loads((base / name).read_bytes()).get("eos_token_id")
        except FileNotFoundError:
            continue
        return [ids] if isinstance(ids, int) else list(ids or [])
    return []


def _message(message: Mapping[str, Any], *, parts: bool) -> dict[str, Any]:
    """The message for the template: content as text or parts, tool arguments as objects."""
    role, texts = message["role"], _texts(message.get("content"))
    content: Any = "\n".join(text for text in texts if text)
    if parts:
        content = (
            "\n".join(texts)
            if role == "tool"
            else [{"type": "text", "text": text} for text in texts]
        )
    made: dict[str, Any] = {"role": role, "content": content}
    if role == "assistant":
        if message.get("tool_calls"):
            made["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
        if message.get("reasoning") is not None:
            made |= {"reasoning": message["reasoning"], "reasoning_content": message["reasoning"]}
    elif role == "tool" and "tool_call_id" in message:
        made["tool_call_id"] = message["tool_call_id"]
    elif role == "developer":
        made["tools"] = message.get("tools")
    if isinstance(message.get("name"), str):
        made["name"] = message["name"]
    return made


def _calling(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An answer that calls tools, as `results` answer it."""
    calls = [
        {
            "id": result["tool_call_id"],
            "type": "function",
            "function": {"name": result["name"], "arguments": {}},
        }
        for result in results
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _texts(content: Any) -> list[str]:
    if content is None:
        return []
    found = []
    for part in [content] if isinstance(content, str) else content:
        text = (
            part
            if isinstance(part, str)
            else part.get("text")
            if part.get("type") == "text"
            else None
        )
        if not isinstance(text, str):
            raise SettingsError(
                "A task's message holds more than text, which this node cannot learn from."
            )
        found.append(text)
    return found


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"].get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = {}
    return {
        **call,
        "function": {
            **call["function"],
            "arguments": arguments if isinstance(arguments, dict) else {},
        },
    }


def _one_system_message(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Role `developer` as vLLM makes it for a template without it: one system message."""
    made = [
        {**{key: value for key, value in message.items() if key != "tools"}, "role": "system"}
        if message["role"] == "developer"
        else message
        for message in conversation
    ]
    systems = [message["content"] for message in made if message["role"] == "system"]
    if len(systems) == 1 and made[0]["role"] == "system":
        return made
    texts = [
        "\n".join(part["text"] for part in content) if isinstance(content, list) else content
        for content in systems
    ]
    merged = {"role": "system", "content": "\n\n".join(text for text in texts if text)}
    return [merged, *(message for message in made if message["role"] != "system")]
