"""Chat requests to one server, in a process of its own, so that they share no event loop with it.

In, as one JSON object on stdin: `url`, `key` (or null), `model`, `requests`, `concurrency`,
`answer_tokens`, `stream`, `seed`. Out, as one JSON object on stdout: `seconds`, `latencies_ms` and
`failed`, the first 5 errors.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import httpx

END = b"data: [DONE]"


async def run(asked: dict[str, Any]) -> dict[str, Any]:
    """Sends all requests, so many at a time."""
    prompts = random.Random(asked["seed"])
    questions = iter(
        [f"ticket {prompts.randrange(10**4):04}: move in lyon" for _ in range(asked["requests"])]
    )
    latencies_ms: list[float] = []
    failed: list[str] = []
    headers = {"authorization": f"Bearer {asked['key']}"} if asked["key"] else {}

    async def client(http: httpx.AsyncClient) -> None:
        for question in questions:
            began = time.monotonic()
            try:
                await _ask(http, asked, question)
            except (httpx.HTTPError, ValueError) as error:
                failed.append(repr(error))
            latencies_ms.append((time.monotonic() - began) * 1e3)

    limits = httpx.Limits(max_connections=asked["concurrency"])
    async with httpx.AsyncClient(
        base_url=asked["url"], headers=headers, limits=limits, timeout=120
    ) as http:
        began = time.monotonic()
        await asyncio.gather(*(client(http) for _ in range(asked["concurrency"])))
        seconds = time.monotonic() - began
    return {"seconds": seconds, "latencies_ms": latencies_ms, "failed": failed[:5]}


async def _ask(http: httpx.AsyncClient, asked: dict[str, Any], question: str) -> None:
    body = {
        "model": asked["model"],
        "messages": [{"role": "user", "content": question}],
        "max_tokens": asked["answer_tokens"],
        "temperature": 0,
        "ignore_eos": True,
        "stream": asked["stream"],
    }
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        content = await answer.aread()
    if answer.status_code != 200:
        raise ValueError(f"{answer.status_code}: {content[:200]!r}")
    if asked["stream"] and END not in content[-32:]:
        raise ValueError(f"a stream without its end: {content[-200:]!r}")


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(json.load(sys.stdin)))))
