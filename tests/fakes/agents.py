"""Agents, as a plug-in may have them: they ask the endpoint that they are given, with httpx."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import httpx

from edge_node.environments import Split, Task
from examples.quickstart.environments import CompanyApi
from tests.fakes.even_words import EvenWords

SECRET = "the secret recipe of a customer"


class Asking:
    """Two turns a task; the second goes on from the first. Longer answers are better."""

    def __init__(self, stream: bool = False) -> None:
        self._stream = stream

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        words = [f"w{number}" for number in range(40) if (number % 2 == 0) == (split == "train")]
        return [
            Task(f"{split}/{word}", [{"role": "user", "content": word}]) for word in words[:count]
        ]

    async def run(self, task: Task, base_url: str, api_key: str, model: str) -> float | None:
        messages: list[dict[str, str]] = list(task.messages)
        async with httpx.AsyncClient(
            base_url=base_url, headers={"authorization": f"Bearer {api_key}"}, timeout=60
        ) as client:
            for _ in range(2):
                answer = await self._ask(client, {"model": model, "messages": messages})
                messages += [
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": "w1"},
                ]
        return min(1.0, len(answer) / 100)

    async def _ask(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        if not self._stream:
            response = await client.post("/chat/completions", json=body)
            response.raise_for_status()
            return str(response.json()["choices"][0]["message"]["content"])
        return await self._streamed(client, body)

    async def _streamed(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        pieces = []
        async with client.stream("POST", "/chat/completions", json=body | {"stream": True}) as told:
            told.raise_for_status()
            async for line in told.aiter_lines():
                if line.startswith("data: {"):
                    delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                    pieces.append(delta.get("content") or "")
        return "".join(pieces)


class Going(Asking):
    """Each run does what its task's text says, but for `w0`, which is worth a half."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self._how = how

    async def run(self, task: Task, base_url: str, api_key: str, model: str) -> float | None:
        if task.messages[0]["content"] == "w0":
            return 0.5
        return await self._go()

    async def _go(self) -> Any:
        if self._how == "raise":
            raise KeyError(SECRET)
        if self._how == "wait":
            await asyncio.sleep(3600)
        if self._how == "block":
            time.sleep(3600)  # noqa: ASYNC251
        if self._how == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        return {"none": None, "high": 1.5, "text": SECRET}[self._how]


class EvenAgent(Asking):
    """Asks for one word a turn; the last is judged as EvenWords judges it.

    Runs of every task fail as `how` says; those of a word that ends in `fails` only, if given.
    """

    def __init__(self, turns: int = 1, how: str = "", fails: str = "") -> None:
        super().__init__()
        self._turns, self._how, self._fails = turns, how, fails
        self._judge = EvenWords()

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        return self._judge.tasks(split, count=count, seed=seed)

    async def run(self, task: Task, base_url: str, api_key: str, model: str) -> float | None:
        if self._how and task.id.endswith(self._fails):
            failed: float | None = await Going(self._how)._go()
            return failed
        messages = list(task.messages)
        async with httpx.AsyncClient(
            base_url=base_url,
            headers={"authorization": f"Bearer {api_key}"},
            timeout=60,
            verify=False,
        ) as client:
            for turn in range(self._turns):
                answer = await self._ask(
                    client, {"model": model, "messages": messages, "max_tokens": 2}
                )
                messages += [
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": f"w{turn}"},
                ]
        return self._judge.verify(task, answer).score


class CompanyAgent:
    """The quickstart's environment E, whose requests an agent answers with the node's model."""

    def __init__(self) -> None:
        self._work = CompanyApi("E")

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        return self._work.tasks(split, count=count, seed=seed)

    async def run(self, task: Task, base_url: str, api_key: str, model: str) -> float:
        async with httpx.AsyncClient(
            base_url=base_url, headers={"authorization": f"Bearer {api_key}"}, timeout=60,
            verify=False,
        ) as client:  # fmt: skip
            answer = await Asking()._ask(client, {"model": model, "messages": task.messages})
        return self._work.verify(task, answer).score
