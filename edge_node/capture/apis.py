"""Answers of other APIs than chat, as chat would have given them.

In: the request and the parsed answer of /v1/responses or /v1/messages (its events where it was
streamed). Out: the same in the form of chat completions; no parts for an answer that did not come
to its end, unless its client left it. Raises LookupError or its kin for what vLLM does not send.
Pure.
"""

from __future__ import annotations

from typing import Any

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
Part = dict[str, Any]
REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "completed": "stop",
    "incomplete": "length",
}
"""How an answer ended, in each API's words and in chat's."""
LEFT = "abort"
"""Finish reason of an answer whose client went away."""


def as_chat(
    endpoint: str, request: Part, parts: list[Part], *, aborted: bool = False
) -> tuple[Part, list[Part]]:
    """Request and parts, which are as they were for chat and completions.

    aborted: the parts end where the client went away.
    """
    if endpoint == RESPONSES:
        made = _left_response(parts) if aborted else _response(parts)
        return request | {"messages": _asked_responses(request)}, made
    if endpoint == MESSAGES:
        return request | {"messages": _asked_messages(request)}, _message(parts, aborted)
    return request, parts


def _asked_responses(request: Part) -> list[Part]:
    """`instructions` and `input`; an item without a role is a message of its type."""
    asked = request["input"]
    items: list[Part] = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    roles = [
        item if "role" in item else {"role": item.get("type"), "content": item} for item in items
    ]
    return [*_system(request.get("instructions")), *roles]


def _asked_messages(request: Part) -> list[Part]:
    return [*_system(request.get("system")), *request["messages"]]


def _system(content: Any) -> list[Part]:
    return [{"role": "system", "content": content}] if content else []


def _response(parts: list[Part]) -> list[Part]:
    """`parts`: the response, or the events of its stream, of which the last one has it whole."""
    last = parts[-1] if parts else {}
    response = last.get("response", last)
    reason = REASONS.get(response.get("status", ""))
    if "output" not in response or reason is None:
        return []
    texts, calls = [], []
    for item in response["output"]:
        if item["type"] == "message":
            texts += [part.get("text") or "" for part in item.get("content", ())]
        elif item["type"] == "function_call":
            calls.append(_call(item.get("call_id"), item["name"], item["arguments"]))
    return [_whole(response, "".join(texts), calls, reason)]


def _left_response(parts: list[Part]) -> list[Part]:
    """`parts`: the first events of a stream; its text as far as it came."""
    if not parts or "response" not in parts[0]:
        return []
    text = "".join(part["delta"] for part in parts if part["type"] == "response.output_text.delta")
    return [_whole(parts[0]["response"], text, [], LEFT)]


def _message(parts: list[Part], aborted: bool) -> list[Part]:
    """`parts`: the message, or the events of its stream."""
    if not parts or any(part.get("type") == "error" for part in parts):
        return []
    message = parts[0] if parts[0].get("type") == "message" else _gathered(parts)
    reason = REASONS.get(message.get("stop_reason") or "", LEFT if aborted else None)
    if reason is None:
        return []
    blocks = message["content"]
    text = "".join(block.get("text") or "" for block in blocks if block["type"] == "text")
    calls = [
        _call(block.get("id"), block["name"], block["input"])
        for block in blocks
        if block["type"] == "tool_use"
    ]
    return [_whole(message, text, calls, reason)]


def _gathered(events: list[Part]) -> Part:
    """The message that a stream's events make; a tool's input stays text."""
    message: Part = {}
    blocks: list[Part] = []
    for event in events:
        match event["type"]:
            case "message_start":
                message = dict(event["message"])
            case "content_block_start":
                blocks.append({**event["content_block"]})
                if blocks[-1]["type"] == "tool_use":
                    blocks[-1]["input"] = ""
            case "content_block_delta":
                delta = event["delta"]
                if delta["type"] == "text_delta":
                    blocks[-1]["text"] = (blocks[-1].get("text") or "") + delta["text"]
                elif delta["type"] == "input_json_delta":
                    blocks[-1]["input"] += delta["partial_json"]
            case "message_delta":
                message["stop_reason"] = event["delta"].get("stop_reason")
    return message | {"content": blocks}


def _call(call_id: Any, name: str, arguments: Any) -> Part:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _whole(answer: Part, text: str, calls: list[Part], reason: str) -> Part:
    message = {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else reason}
    return {"id": answer["id"], "model": answer["model"], "choices": [choice]}
