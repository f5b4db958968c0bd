"""A customer's traffic: sends tasks, judges the answers, tells the node what was wrong.

In: a node's address, an alias and tasks. Out: counts of what came back. Uses public interfaces
only: the `openai` client, and `POST /v1/feedback`. Nothing is retried, so every failed request is
seen and counted.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from openai import AsyncOpenAI, OpenAIError

from edge_node.environments import Document, Environment, Task
from examples.quickstart.world import Asking

T = TypeVar("T")

ASKING = Asking()


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


@dataclass
class TextMeasurement(Counts):
    """Log-probabilities of texts under one release."""

    logprob: float = 0.0
    """Sum over all tokens but the first of each text, in nats."""
    tokens: int = 0

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.logprob / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class _Answer:
    id: str
    text: str


async def send_wave(
    url: str,
    alias: str,
    environment: Environment,
    tasks: Sequence[Task],
    asking: Asking = ASKING,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Wave:
    """Ask every task once, verify, and post feedback: a score, and a correction after a failure.

    Args:
        url: the node's address without `/v1`, for example `http://127.0.0.1:8000`.
        alias: the stable model name.
        environment: judges the answers.
        tasks: what to ask.
        asking: how long answers may be, and how many are asked for at a time.
        transport: how httpx reaches the address; tests answer here.
    """
    wave = await ask_wave(url, alias, environment, tasks, asking, transport)
    await give_feedback(url, wave, asking, transport)
    return wave


async def ask_wave(
    url: str,
    alias: str,
    environment: Environment,
    tasks: Sequence[Task],
    asking: Asking = ASKING,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Wave:
    """The first half of `send_wave`: ask and verify; the feedback waits in `wave.pending`."""
    wave = Wave()

    async def one(client: AsyncOpenAI, _: httpx.AsyncClient, task: Task) -> None:
        answer = await _ask(client, alias, alias, task, wave, asking)
        if answer is None:
            return
        outcome = environment.verify(task, answer.text)
        wave.passed += outcome.passed
        feedback: dict[str, str | float] = {"id": answer.id, "score": outcome.score}
        if outcome.correction is not None:
            feedback["correction"] = outcome.correction
        wave.pending.append(feedback)

    await _for_each(url, tasks, asking, one, transport)
    return wave


async def give_feedback(
    url: str, wave: Wave, asking: Asking = ASKING, transport: httpx.AsyncBaseTransport | None = None
) -> None:
    """The second half of `send_wave`: post what waits in `wave.pending`."""
    waiting, wave.pending = wave.pending, []

    async def one(
        _: AsyncOpenAI, http: httpx.AsyncClient, feedback: dict[str, str | float]
    ) -> None:
        posted = await _post(http, "/v1/feedback", feedback, wave)
        wave.corrected += posted is not None and "correction" in feedback

    await _for_each(url, waiting, asking, one, transport)


async def measure(
    url: str,
    model: str,
    environment: Environment,
    tasks: Sequence[Task],
    asking: Asking = ASKING,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Measurement:
    """Ask every held-out task once, greedily, and count the verified answers.

    Args:
        url: the node's address without `/v1`.
        model: the alias, or one exact version.
        environment: judges the answers.
        tasks: what to ask.
        asking: how long answers may be, and how many are asked for at a time.
        transport: how httpx reaches the address; tests answer here.
    """
    measurement = Measurement()

    async def one(client: AsyncOpenAI, _: httpx.AsyncClient, task: Task) -> None:
        answer = await _ask(client, model, model.partition("@")[0], task, measurement, asking)
        if answer is not None:
            measurement.passed += environment.verify(task, answer.text).passed

    await _for_each(url, tasks, asking, one, transport)
    return measurement


async def measure_texts(
    url: str,
    model: str,
    documents: Sequence[Document],
    asking: Asking = ASKING,
    transport: httpx.AsyncBaseTransport | None = None,
) -> TextMeasurement:
    """How likely `model`, the alias or one exact version, finds the documents."""
    measurement = TextMeasurement()

    async def one(_: AsyncOpenAI, http: httpx.AsyncClient, document: Document) -> None:
        # With 0 further tokens asked for, an entry holds the text's own token alone.
        body = {"model": model, "prompt": document.text, "max_tokens": 1, "temperature": 0}
        answer = await _post(http, "/v1/completions", body | {"prompt_logprobs": 0}, measurement)
        if answer is None:
            return
        _count_model(measurement, answer["model"], model.partition("@")[0])
        for entry in answer["choices"][0]["prompt_logprobs"][1:]:
            measurement.logprob += sum(token["logprob"] for token in entry.values())
            measurement.tokens += len(entry)

    await _for_each(url, documents, asking, one, transport)
    return measurement


def is_exact(model: str, alias: str) -> bool:
    """Whether an answer's `model` names one immutable release."""
    return re.fullmatch(re.escape(alias) + r"@v\d+-[0-9a-f]{8}", model) is not None


async def _ask(
    client: AsyncOpenAI, model: str, alias: str, task: Task, counts: Counts, asking: Asking
) -> _Answer | None:
    counts.total += 1
    try:
        completion = await client.chat.completions.create(
            model=model,
            messages=task.messages,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=asking.max_answer_tokens,
        )
    except OpenAIError as error:
        _fail(counts, f"{type(error).__name__}: {error}")
        return None
    _count_model(counts, completion.model, alias)
    return _Answer(completion.id, completion.choices[0].message.content or "")


async def _post(
    http: httpx.AsyncClient, path: str, body: Mapping[str, object], counts: Counts
) -> Any | None:
    """The answer's JSON; None when there was no good one."""
    counts.total += 1
    try:
        response = await http.post(path, json=body)
    except httpx.HTTPError as error:
        _fail(counts, f"{type(error).__name__}: {error}")
        return None
    if response.status_code != httpx.codes.OK:
        _fail(counts, f"{path} {response.status_code}: {response.text}")
        return None
    return response.json()


def _count_model(counts: Counts, model: str, alias: str) -> None:
    counts.models[model] = counts.models.get(model, 0) + 1
    counts.inexact += not is_exact(model, alias)


def _fail(counts: Counts, message: str) -> None:
    counts.failed += 1
    if len(counts.errors) < 5:
        counts.errors.append(message.splitlines()[0] if message else "no message")


async def _for_each(
    url: str,
    items: Sequence[T],
    asking: Asking,
    one: Callable[[AsyncOpenAI, httpx.AsyncClient, T], Awaitable[None]],
    transport: httpx.AsyncBaseTransport | None,
) -> None:
    http = httpx.AsyncClient(base_url=url, timeout=asking.timeout_s, transport=transport)
    # The openai client types its own copy of httpx, and takes a client of the original as well.
    shared: Any = None if transport is None else http
    client = AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        max_retries=0,
        timeout=asking.timeout_s,
        http_client=shared,
    )
    async with http, client:
        pending = iter(items)

        async def work() -> None:
            for item in pending:
                await one(client, http, item)

        async with asyncio.TaskGroup() as group:
            for _ in range(asking.at_once):
                group.create_task(work())
