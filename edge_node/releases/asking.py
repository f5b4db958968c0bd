"""Requests of an evaluation to this node's own vLLM.

In: an open client, a route, a body. Out: vLLM's answer, made by exactly the version asked for.
Guarantees: nothing is captured, and no error quotes a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from edge_node.errors import ServingError

CONCURRENCY = 32
"""Requests at once, for each of the two releases."""


async def ask(
    client: httpx.AsyncClient, path: str, body: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """vLLM's answer to `body`, which names the `model`.

    what: the task or document, for the error. Raises ServingError.
    """
    model = body["model"]
    try:
        response = await client.post(path, json=body, headers={"x-lorikeet-capture": "off"})
    except httpx.HTTPError as error:
        raise ServingError(
            f"vLLM did not answer an evaluation request for {model}: {error!r}."
        ) from error
    if response.status_code != httpx.codes.OK:
        # Not vLLM's words: they may quote the prompt, and the log and central get the reason.
        raise ServingError(
            f"vLLM answered {response.status_code} to an evaluation request for {model}, {what}."
        )
    document: dict[str, Any] = response.json()
    if document["model"] != model:
        raise ServingError(f"Evaluation asked for {model} and was answered by {document['model']}.")
    return document
