"""Messages -> token ids, as this node's vLLM makes them, for what was never served: anchors and
environment tasks.

In: a tokenizer, and the chat format that vLLM said it uses (`chat_format.json` in the data
directory). Out: prompt ids, answer ids. Guarantees: for text messages the ids are those that vLLM
makes of them (a contract test compares). What was served is never rendered again: its ids are in
the experience store. Imports no library by itself.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edge_node.errors import SettingsError, StorageError

FILE_NAME = "chat_format.json"
HF_RENDERER = "HfRenderer"
"""Name of the vLLM renderer that this module agrees with: a Jinja template over a Hugging Face
tokenizer.
"""
PROBE = "qzxprobe"
"""An answer that no template and no special token holds a part of."""
RESERVED = frozenset({"tokenize", "return_dict", "chat_template"})
"""Template options that are this module's to set."""


@dataclass(frozen=True)
class ChatFormat:
    """How vLLM turns messages into a prompt, as it resolved the operator's arguments itself."""

    template: str | None = None
    """The Jinja template; None: the tokenizer's own."""
    parts: bool = False
    """True: the template reads content as a list of parts (vLLM's content format `openai`), not as
    a string.
    """
    options: Mapping[str, Any] = field(default_factory=dict)
    """Template variables that every request has: vLLM's --default-chat-template-kwargs."""
    tokenizer: str | None = None
    """Directory of the tokenizer; None: the base model's."""
    renderer: str = HF_RENDERER
    """Class of vLLM's renderer."""

    def write(self, data_dir: Path) -> None:
        """Replaces the one before, never by half a file; vLLM writes it at every start. Raises
        OSError.
        """
        data_dir.mkdir(parents=True, exist_ok=True)
        partial = data_dir / f"{FILE_NAME}.partial"
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(data_dir / FILE_NAME)

    @classmethod
    def read(cls, data_dir: Path) -> ChatFormat:
        """What vLLM wrote at its last start; the tokenizer's own template when it never ran here.
        Raises StorageError.
        """
        path = data_dir / FILE_NAME
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(f"{path} cannot be read: {error}. Restart the node: vLLM writes it anew.") from error


class Renderer:
    """One tokenizer with one chat format; usable from several threads when the tokenizer is."""

    def __init__(self, tokenizer: Any, stop_ids: Collection[int], chat: ChatFormat | None = None) -> None:
        """`stop_ids`: further tokens that end an answer of the model, beside the tokenizer's eos
        (`read_stop_ids`).
        """
        self.tokenizer = tokenizer
        self._stop_ids = {*stop_ids, tokenizer.eos_token_id}
        self._chat = chat or ChatFormat()

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of the prompt of a chat request with these messages and no further fields.

        Raises:
            SettingsError: vLLM renders with something else than a chat template, or a content holds
                more than text.
            Exception: whatever the template raises on messages that it refuses.
        """
        if self._chat.renderer != HF_RENDERER:
            raise SettingsError(
                f"vLLM renders prompts with {self._chat.renderer}; the learner knows Jinja chat templates only. "
                "Take --tokenizer-mode out of EDGE_SERVING__EXTRA_ARGS."
            )
        return self._encode(self._render(messages, add_generation_prompt=True))

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer with this text, to its end: the last one is `end_of_turn`."""
        ids = self._encode(text)
        return ids if ids and ids[-1] == self.end_of_turn else [*ids, self.end_of_turn]

    @cached_property
    def end_of_turn(self) -> int:
        """Id that ends an answer: the stop token that the chat template writes after one, else the
        tokenizer's eos.

        They differ for some models (Gemma: <end_of_turn> and <eos>); a model trained on the wrong
        one never stops.
        """
        messages = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
        try:
            text = self._render(messages, add_generation_prompt=False)
        except Exception:  # a template may refuse anything by raising, and completions need none
            text = ""
        _, found, after = text.rpartition(PROBE)
        ids = self._encode(after) if found else []
        return int(next((token for token in ids if token in self._stop_ids), self.tokenizer.eos_token_id))

    def _render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        conversation = [_message(message, parts=self._chat.parts) for message in messages]
        template = self._chat.template
        if any(message["role"] == "developer" for message in conversation):
            known = template if template is not None else str(self.tokenizer.chat_template)
            if '"developer"' not in known and "'developer'" not in known:
                conversation = _one_system_message(conversation)
        options = {name: value for name, value in self._chat.options.items() if name not in RESERVED}
        options |= {"add_generation_prompt": add_generation_prompt, "continue_final_message": False}
        return str(self.tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False, **options))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def load_renderer(base: Path, chat: ChatFormat | None = None) -> Renderer:
    """The renderer of the base model in this directory (loads transformers)."""
    from transformers import AutoTokenizer

    chat = chat or ChatFormat()
    tokenizer = AutoTokenizer.from_pretrained(chat.tokenizer or base, local_files_only=True)
    return Renderer(tokenizer, read_stop_ids(base), chat)


def read_stop_ids(base: Path) -> list[int]:
    """Ids that end an answer, from the model's generation config, or its config where there is
    none.
    """
    for name in ("generation_config.json", "config.json"):
        try:
            ids = json.loads((base / name).read_bytes()).get("eos_token_id")
        except FileNotFoundError:
            continue
        return [ids] if isinstance(ids, int) else list(ids or [])
    return []


def _message(message: Mapping[str, Any], *, parts: bool) -> dict[str, Any]:
    """The message as vLLM gives it to the template: content as text or parts, tool arguments as
    objects.
    """
    role, texts = message["role"], _texts(message.get("content"))
    content: Any = "\n".join(text for text in texts if text)
    if parts:
        content = "\n".join(texts) if role == "tool" else [{"type": "text", "text": text} for text in texts]
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


def _texts(content: Any) -> list[str]:
    if content is None:
        return []
    found = []
    for part in [content] if isinstance(content, str) else content:
        text = part if isinstance(part, str) else part.get("text") if part.get("type") == "text" else None
        if not isinstance(text, str):
            raise SettingsError("A task's message holds more than text, which this node cannot learn from.")
        found.append(text)
    return found


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"].get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = {}
    return {**call, "function": {**call["function"], "arguments": arguments if isinstance(arguments, dict) else {}}}


def _one_system_message(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What vLLM makes of the role `developer` where the template does not know it: the system
    message, and one only.
    """
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
        "\n".join(part["text"] for part in content) if isinstance(content, list) else content for content in systems
    ]
    merged = {"role": "system", "content": "\n\n".join(text for text in texts if text)}
    return [merged, *(message for message in made if message["role"] != "system")]
