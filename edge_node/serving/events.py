"""Server-sent events, as far as the node must understand them: how a stream begins and ends.

In: a piece of a stream as vLLM sends it, which is one event. Out: what it means. Pure.
"""

from __future__ import annotations

import json
from typing import Any

from edge_node.serving.routes import MESSAGES, RESPONSES

ERROR = b'data: {"error":'
NAMED_ERROR = b"event: error\n"
PREAMBLE = (b"event: response.created\n", b"event: response.in_progress\n")
"""What /v1/responses says before the engine has the request."""
LAST = {
    RESPONSES: (b"event: response.completed\n", b"event: response.incomplete\n"),
    MESSAGES: (b"event: message_stop\n",),
}
DONE = b"data: [DONE]\n\n"


def is_preamble(event: bytes) -> bool:
    """It says nothing of whether the request will be answered."""
    return event.startswith(PREAMBLE)


def is_last(path: str, event: bytes) -> bool:
    """The answer is whole with it. A newline inside of JSON is escaped, so no text looks so."""
    last = LAST.get(path)
    return event.endswith(DONE) if last is None else any(name in event for name in last)


def error_of(event: bytes) -> Any:
    """The error that an event is; None for a piece of an answer."""
    if not event.startswith((ERROR, NAMED_ERROR)):
        return None
    line = event.removeprefix(NAMED_ERROR).removeprefix(b"data: ").partition(b"\n")[0]
    try:
        return json.loads(line)["error"]
    except ValueError:  # not a whole event
        return None


def status_of(error: Any) -> int:
    """The HTTP status that the error names; 500 when it names none of an error."""
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500
