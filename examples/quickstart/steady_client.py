"""A client that goes on whatever dies, and remembers everything that was acknowledged.

In: a node's address and its environment. Out: ids of acknowledged answers and of acknowledged
feedback. A request that fails is repeated until it is answered; feedback for an acknowledged answer
is repeated until it is accepted, and a "no such interaction" for one is remembered, because it
means that the node lost what it had acknowledged.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import Any

import httpx

from edge_node.environments import Environment
from examples.quickstart.system import ALIAS
from examples.quickstart.traffic import ASKING, is_exact

PAUSE_S = 0.1
RETRY_S = 0.5
TIMEOUT_S = 90.0


@dataclass
class Acknowledged:
    """What the node said it has."""

    answers: list[str] = field(default_factory=list)
    feedback: list[str] = field(default_factory=list)
    passed: int = 0
    repeats: int = 0
    """Requests that got no answer because something was dead, and were sent again."""
    unexpected: list[str] = field(default_factory=list)
    """Responses that no crash explains."""


class SteadyClient:
    """`run()` until cancelled."""

    def __init__(self, url: str, environment: Environment, seed: int) -> None:
        self._url = url
        self._environment = environment
        self._seed = seed
        self.acknowledged = Acknowledged()

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT_S) as client:
            for part in itertools.count():
                for task in self._environment.tasks(
                    "train", count=200, seed=1000 * self._seed + part
                ):
                    body = {
                        "model": ALIAS,
                        "messages": task.messages,
                        "temperature": 0,
                        "max_tokens": ASKING.max_answer_tokens,
                    }
                    completion = await self._until_answered(client, "/v1/chat/completions", body)
                    if completion is None:
                        continue
                    self.acknowledged.answers.append(completion["id"])
                    if not is_exact(completion["model"], ALIAS):
                        self.acknowledged.unexpected.append(f"answer by {completion['model']!r}")
                    outcome = self._environment.verify(
                        task, completion["choices"][0]["message"]["content"] or ""
                    )
                    self.acknowledged.passed += outcome.passed
                    feedback = {"id": completion["id"], "score": outcome.score}
                    if outcome.correction is not None:
                        feedback["correction"] = outcome.correction
                    accepted = await self._until_answered(client, "/v1/feedback", feedback)
                    if accepted is not None:
                        self.acknowledged.feedback.append(accepted["id"])
                    await asyncio.sleep(PAUSE_S)

    async def _until_answered(
        self, client: httpx.AsyncClient, path: str, body: dict[str, object]
    ) -> dict[str, Any] | None:
        """The answer; None for a refusal (4xx), which is remembered as unexpected."""
        while True:
            try:
                response = await client.post(path, json=body)
                if response.status_code == httpx.codes.OK:
                    return dict(response.json())
                if response.status_code < 500:
                    self.acknowledged.unexpected.append(
                        f"{path} {response.status_code}: {response.text[:200]}"
                    )
                    return None
            except (httpx.HTTPError, ValueError):
                pass  # a connection that died, or an answer that was cut
            self.acknowledged.repeats += 1
            await asyncio.sleep(RETRY_S)
