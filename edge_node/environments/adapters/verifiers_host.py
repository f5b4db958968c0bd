"""Runs an environment of Prime Intellect's verifiers, with whatever Python has that package.

In: one JSON object a line on standard input: load, tasks, run or cancel, each with an id. Out: one
a line on standard output, `{"id": ..., "value": ...}` or `{"id": ..., "error": ...}`. Guarantees:
it needs the standard library and verifiers alone; runs go on at once; what an environment prints
goes to standard error.

It is started by its path with `python -I`: the other modules of its folder have names of packages.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import itertools
import json
import os
import random
import sys
from contextlib import AsyncExitStack
from typing import Any

MOST_TASKS = 10_000
"""Of a set of tasks that has no end."""


class V0:
    """verifiers before 0.4: `verifiers.load_environment(name, **arguments)`, or `module:Class`."""

    def __init__(self, verifiers: Any, name: str, config: dict[str, Any]) -> None:
        self._vf = verifiers
        module, _, attribute = name.partition(":")
        if attribute:
            self._env = getattr(importlib.import_module(module), attribute)(**config)
        else:
            self._env = verifiers.load_environment(name, **config)
        train = [dict(row) for row in self._env.get_dataset()]
        held_out = [dict(row) for row in self._env.get_eval_dataset()]
        self.rows = {"train": train, "held_out": held_out}

    async def start(self) -> None:
        """Nothing has to be started."""

    def text(self, row: Any) -> str:
        return _text(row["prompt"])

    async def run(self, row: Any, base_url: str, key_variable: str, model: str) -> float:
        client = self._vf.ClientConfig(api_base_url=base_url, api_key_var=key_variable)
        outputs = await self._env.generate(
            inputs=[row], client=client, model=model, independent_scoring=True
        )
        (output,) = outputs["outputs"]
        if output.get("error"):
            raise RuntimeError("the rollout has an error")
        return float(output["reward"])


class V1:
    """verifiers from 0.4 on: a set of tasks, and agents that play it."""

    def __init__(self, verifiers: Any, name: str, config: dict[str, Any]) -> None:
        self._vf = verifiers
        taskset = {**config.get("taskset", {}), "id": name}
        resolved = verifiers.resolve_env_config({**config, "taskset": taskset})
        self._env = verifiers.load_environment(resolved)
        self._held = AsyncExitStack()
        tasks = list(itertools.islice(self._env.taskset, MOST_TASKS))
        self.rows = {"train": tasks, "held_out": tasks}

    async def start(self) -> None:
        await self._held.enter_async_context(self._env.serving())

    def text(self, row: Any) -> str:
        prompt = row.data.prompt_text
        return "\n".join(filter(None, (row.data.system_prompt, prompt))) or row.key

    async def run(self, row: Any, base_url: str, key_variable: str, model: str) -> float:
        client = self._vf.EvalClientConfig(base_url=base_url, api_key_var=key_variable)
        context = self._vf.ModelContext(model=model, client=client)
        episode = await self._env.run_episode(row, context)
        if not episode.ok:
            errors = [*episode.errors, *(error for one in episode.traces for error in one.errors)]
            raise RuntimeError(f"the episode failed: {', '.join(sorted({e.type for e in errors}))}")
        rewards = [trace.reward for trace in episode.traces]
        return float(sum(rewards) / len(rewards))


class Host:
    """One environment, and the requests that are under way."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self._environment: Any = None
        self._runs: dict[int, asyncio.Task[None]] = {}

    async def take(self, request: dict[str, Any]) -> None:
        number = request["id"]
        if request["method"] == "cancel":
            if number in self._runs:
                self._runs[number].cancel()
        elif request["method"] == "run":
            task = asyncio.create_task(self._reply(number, self._run(number, request)))
            self._runs[number] = task
            task.add_done_callback(lambda _: self._runs.pop(number, None))
        else:
            method = self._load if request["method"] == "load" else self._tasks
            await self._reply(number, method(request))

    async def _reply(self, number: int, work: Any) -> None:
        try:
            self._answer({"id": number, "value": await work})
        except (Exception, SystemExit) as error:  # an environment may raise anything
            self._answer({"id": number, "error": f"{type(error).__name__}: {error}"})

    async def _load(self, request: dict[str, Any]) -> str:
        root = importlib.import_module("verifiers")
        if hasattr(root, "load_environment"):
            self._environment = V0(root, request["name"], request["config"])
        else:
            v1 = importlib.import_module("verifiers.v1")
            self._environment = V1(v1, request["name"], request["config"])
        await self._environment.start()
        return str(root.__version__)

    async def _tasks(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        split, rows = request["split"], self._environment.rows
        apart = self._texts("held_out").isdisjoint(self._texts("train"))
        order = list(range(len(rows[split])))
        random.Random(f"{split}/{request['seed']}").shuffle(order)
        found: dict[str, dict[str, Any]] = {}
        for index in order:
            if len(found) == request["count"]:
                break
            text = self._environment.text(rows[split][index])
            even = hashlib.sha256(text.encode()).digest()[0] % 2 == 0
            if apart or even == (split == "train"):
                found.setdefault(text, {"text": text, "split": split, "index": index})
        return list(found.values())

    def _texts(self, split: str) -> set[str]:
        return {self._environment.text(row) for row in self._environment.rows[split]}

    async def _run(self, number: int, request: dict[str, Any]) -> float:
        # verifiers reads an API key from a variable, and each run has its own.
        variable = f"LORIKEET_RUN_{number}_API_KEY"
        os.environ[variable] = request["api_key"]
        try:
            row = self._environment.rows[request["split"]][request["index"]]
            reward: float = await self._environment.run(
                row, request["base_url"], variable, request["model"]
            )
            return reward
        finally:
            del os.environ[variable]


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


async def _serve() -> None:
    link = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an environment prints must not be taken for a reply

    def answer(reply: dict[str, Any]) -> None:
        link.write(json.dumps(reply) + "\n")
        link.flush()

    host, loop = Host(answer), asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        await host.take(json.loads(line))


if __name__ == "__main__":
    asyncio.run(_serve())
