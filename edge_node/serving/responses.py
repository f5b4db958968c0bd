"""/v1/responses without memory: nothing of one request is there for another one.

In: a parsed request. Out: the same, which stores nothing, or an Unreadable. Reason: vLLM's store is
of the process, so that whoever knows an id could read another key's answer.
"""

from __future__ import annotations

from reprlib import repr  # the value seen, cut short
from typing import Any

from edge_node.serving.refusals import Unreadable

FORGETS = "this node keeps no responses. Send the whole conversation in `input`."
STATE = {
    "previous_response_id": FORGETS,
    "conversation": FORGETS,
    "background": "this node answers in the same call. Leave it out; `stream` shows progress.",
}
"""Field -> what to do instead."""


def without_state(request: dict[str, Any]) -> None:
    """Switches the store off; raises Unreadable for a request that needs what was stored."""
    for field, instead in STATE.items():
        value = request.get(field)
        if value is not None and value is not False:
            raise Unreadable(f"{field} is {repr(value)}; {instead}", field)
    if request.get("store") in (None, True, False):  # of another one vLLM's own 400 tells
        request["store"] = False
