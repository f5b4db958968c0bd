"""A customer's traffic: sends tasks, judges the answers, tells the node what was wrong.

In: a node's address, an alias and tasks. Out: counts of what came back. Uses public interfaces only: the `openai`
client, and `POST /v1/feedback`. Nothing is retried, so every failed request is seen and counted.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from openai import AsyncOpenAI, OpenAIError

from edge_node.environments import Environment, Task

T = TypeVar("T")

MAX_ANSWER_TOKENS = 64
TIMEOUT_S = 60.0


@dataclass
class Counts:
    """Everything that was asked of one node."""

    total: int = 0
    """Requests sent: answers asked for, and feedback posted."""
    failed: int = 0
    """Requests without a good response."""
    inexact: int = 0
    """Answers whose `model` is not `alias@vN-xxxxxxxx`."""
    models: dict[str, int] = field(default_factory=dict)
    """Answers by exact model name."""
    errors: list[str] = field(default_factory=list)
    """First lines of what failed."""


@dataclass
class Wave(Counts):
    """Traffic with feedback."""

    passed: int = 0
    corrected: int = 0
    """Feedback accepted with a correction."""
    pending: list[dict[str, str | float]] = field(default_factory=list)
    """Feedback that is not posted yet."""


@dataclass
class Measurement(Counts):
    """Answers to held-out tasks; no feedback, so nothing of them can be learnt."""

    passed: int = 0

    @property
    def success(self) -> float:
        """Verified answers in percent of what was asked."""
        return 100.0 * self.passed / self.total if self.total else 0.0


@dataclass(frozen=True)
class _Answer:
    id: str
    text: str


async def send_wave(
    url: str,
    alias: str,
    environment: Environment,
    tasks: Sequence[Task],
    concurrency: int = 8,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Wave:
    """Ask every task once, verify, and post feedback: a score, and the correction where the answer failed.

    Args:
        url: the node's address without `/v1`, for example `http://127.0.0.1:8000`.
        alias: the stable model name.
        environment: judges the answers.
        tasks: what to ask.
        concurrency: requests in flight at a time.
        transport: how httpx reaches the address; tests answer here.
    """
    wave = await ask_wave(url, alias, environment, tasks, concurrency, transport)
    await give_feedback(url, wave, concurrency, transport)
    return wave


async def ask_wave(
    url: str,
    alias: str,
    environment: Environment,
    tasks: Sequence[Task],
    concurrency: int = 8,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Wave:
    """The first half of `send_wave`: ask and verify. What there is to say of the answers waits in `wave.pending`."""
    wave = Wave()

    async def one(client: AsyncOpenAI, _: httpx.AsyncClient, task: Task) -> None:
        answer = await _ask(client, alias, alias, task, wave)
        if answer is None:
            return
        outcome = environment.verify(task, answer.text)
        wave.passed += outcome.passed
        feedback: dict[str, str | float] = {"id": answer.id, "score": outcome.score}
        if outcome.correction is not None:
            feedback["correction"] = outcome.correction
        wave.pending.append(feedback)

    await _for_each(url, tasks, concurrency, one, transport)
    return wave


async def give_feedback(
    url: str, wave: Wave, concurrency: int = 8, transport: httpx.AsyncBaseTransport | None = None
) -> None:
    """The second half of `send_wave`: post what waits in `wave.pending`."""
    waiting, wave.pending = wave.pending, []

    async def one(_: AsyncOpenAI, http: httpx.AsyncClient, feedback: dict[str, str | float]) -> None:
        if await _post_feedback(http, feedback, wave) and "correction" in feedback:
            wave.corrected += 1

    await _for_each(url, waiting, concurrency, one, transport)


async def measure(
    url: str,
    model: str,
    environment: Environment,
    tasks: Sequence[Task],
    concurrency: int = 32,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Measurement:
    """Ask every held-out task once, greedily, and count the verified answers.

    Args:
        url: the node's address without `/v1`.
        model: the alias, or one exact version.
        environment: judges the answers.
        tasks: what to ask.
        concurrency: requests in flight at a time.
        transport: how httpx reaches the address; tests answer here.
    """
    measurement = Measurement()

    async def one(client: AsyncOpenAI, _: httpx.AsyncClient, task: Task) -> None:
        answer = await _ask(client, model, model.partition("@")[0], task, measurement)
        if answer is not None:
            measurement.passed += environment.verify(task, answer.text).passed

    await _for_each(url, tasks, concurrency, one, transport)
    return measurement


def is_exact(model: str, alias: str) -> bool:
    """Whether an answer's `model` names one immutable release."""
    return re.fullmatch(re.escape(alias) + r"@v\d+-[0-9a-f]{8}", model) is not None


async def _ask(client: AsyncOpenAI, model: str, alias: str, task: Task, counts: Counts) -> _Answer | None:
    counts.total += 1
    try:
        completion = await client.chat.completions.create(
            model=model,
            messages=task.messages,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=MAX_ANSWER_TOKENS,
        )
    except OpenAIError as error:
        _fail(counts, f"{type(error).__name__}: {error}")
        return None
    counts.models[completion.model] = counts.models.get(completion.model, 0) + 1
    counts.inexact += not is_exact(completion.model, alias)
    return _Answer(completion.id, completion.choices[0].message.content or "")


async def _post_feedback(http: httpx.AsyncClient, feedback: dict[str, str | float], counts: Counts) -> bool:
    counts.total += 1
    try:
        response = await http.post("/v1/feedback", json=feedback)
    except httpx.HTTPError as error:
        _fail(counts, f"{type(error).__name__}: {error}")
        return False
    if response.status_code != httpx.codes.OK:
        _fail(counts, f"feedback {response.status_code}: {response.text}")
        return False
    return True


def _fail(counts: Counts, message: str) -> None:
    counts.failed += 1
    if len(counts.errors) < 5:
        counts.errors.append(message.splitlines()[0] if message else "no message")


async def _for_each(
    url: str,
    items: Sequence[T],
    concurrency: int,
    one: Callable[[AsyncOpenAI, httpx.AsyncClient, T], Awaitable[None]],
    transport: httpx.AsyncBaseTransport | None,
) -> None:
    http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, transport=transport)
    # The openai client types its own copy of httpx, and takes a client of the original as well.
    shared: Any = None if transport is None else http
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S, http_client=shared)
    async with http, client:
        pending = iter(items)

        async def work() -> None:
            for item in pending:
                await one(client, http, item)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
