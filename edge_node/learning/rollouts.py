"""Answers of the node's own vLLM to the learner's tasks.

In: the name of a served version; prompts in token ids, episodes to play, or agents to run. Out:
sampled answers with their ids and log-probabilities, or None where a request failed. Guarantees:
nothing of it is captured; the same version, prompt and seed give the same answers; users' requests
go first. A run of an agent that fails is an answer without tokens, and costs no other.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from edge_node.environments.tools import MAX_OPEN
from edge_node.episodes import Sample, Trajectory, Turn, sampler
from edge_node.errors import EnvironmentFault, ServingError
from edge_node.learning.plans import GrpoPlan
from edge_node.learning.steering import UserLimits
from edge_node.serving import ControlClient
from lorikeet.together import together

log = logging.getLogger(__name__)

UNCAPTURED = {"x-lorikeet-capture": "off"}
BEAT_S = 5.0
"""How often a learner that waits for an answer gives a sign of life."""
LOOK_S = 0.5
"""How often rollouts look whether the users have been served."""


Play = Callable[[Sample], Awaitable[Trajectory | None]]
"""Plays an episode of one task; None: its environment raised. Raises ServingError."""
Run = Callable[..., Awaitable[Trajectory | None]]
"""`Exercise.run`."""


@dataclass(frozen=True)
class Ask:
    """One task. seed: of its samples. play: of one with tools; then each sample is an episode.

    run: of one of agents; then each sample is a run.
    """

    prompt_ids: Sequence[int]
    seed: int
    play: Play | None = None
    run: Run | None = None
    environment: str = ""


@dataclass(frozen=True)
class Answer:
    """token_ids: to the token that ended it. logprobs: of each, natural, at temperature 1.

    Of an episode they are those of all turns and of the tools' results, and there is no text.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    episode: Trajectory | None = None


class Rollouts(Protocol):
    """What a grpo round needs of vLLM."""

    async def sample(
        self, model: str, asks: Sequence[Ask]
    ) -> Sequence[Sequence[Answer | None] | None]:
        """For each of `asks` the plan's number of answers, or None where vLLM gave none."""


@asynccontextmanager
async def beating(control: ControlClient, beat: Callable[[], None]) -> AsyncIterator[None]:
    """Inside the block `beat` is called while vLLM's control socket answers.

    One request may take longer than the supervisor lets a learner be silent. A vLLM that hangs is
    ended by the supervisor, and its requests with it.
    """

    async def beats() -> None:
        while True:
            with suppress(ServingError):
                await control.state()
                beat()
            await asyncio.sleep(BEAT_S)

    task = asyncio.create_task(beats())
    try:
        yield
    finally:
        task.cancel()


class VllmRollouts:
    """Rollouts over the control socket, which needs no key and no deadline."""

    def __init__(
        self,
        control: ControlClient,
        plan: GrpoPlan,
        *,
        in_flight: int,
        yield_above: int,
        yield_first_token_s: float | None = None,
        yield_at_most_s: float = 60.0,
        beat: Callable[[], None] = lambda: None,
        trouble: Callable[[EnvironmentFault | None], None] = lambda fault: None,
    ) -> None:
        """trouble: told after each `sample` with runs the fault of an environment of agents none of
        whose runs got a reward; None when there is no such environment.
        """
        self._control = control
        self._plan = plan
        self._in_flight = in_flight
        self._limits = UserLimits(yield_above, yield_first_token_s)
        self._yield_at_most_s = yield_at_most_s
        self._beat = beat
        self._trouble = trouble
        self._faults: list[EnvironmentFault] = []

    async def sample(self, model: str, asks: Sequence[Ask]) -> list[list[Answer] | None]:
        """Raises EnvironmentFault when an environment hung or crashed; of agents only when there
        is nothing else to learn from.
        """
        self._faults = []
        gate, seats = asyncio.Semaphore(self._in_flight), asyncio.Semaphore(MAX_OPEN)
        async with (
            self._control.requests(self._in_flight * self._plan.samples) as client,
            beating(self._control, self._beat),
        ):

            async def one(ask: Ask) -> list[Answer] | None:
                async with gate:
                    try:
                        await self._let_users_pass()
                    except ServingError:  # vLLM is away
                        return None
                    if ask.run is not None:
                        answers = await self._runs(model, ask, ask.run)
                    elif ask.play is None:
                        answers = await self._ask(client, model, ask)
                    else:
                        answers = await self._episodes(client, model, ask, ask.play, seats)
                    self._beat()
                    return answers

            groups = await together(one(ask) for ask in asks)
        self._tell_faults(asks, groups)
        return groups

    def _tell_faults(self, asks: Sequence[Ask], groups: Sequence[Sequence[Answer] | None]) -> None:
        if not any(ask.run for ask in asks):
            return
        works = {
            ask.environment
            for ask, group in zip(asks, groups, strict=True)
            if group is None or any(answer.token_ids for answer in group)
        }
        broken = [fault for fault in self._faults if fault.environment not in works]
        if self._faults:
            log.warning(
                "runs of agents failed; they are left out",
                extra={"failed": len(self._faults), "first": str(self._faults[0])},
            )
        if not works and (ended := [fault for fault in broken if not fault.raised]):
            raise ended[0]
        self._trouble(broken[0] if broken else None)

    async def _let_users_pass(self) -> None:
        ends = time.monotonic() + self._yield_at_most_s
        while time.monotonic() < ends and self._limits.are_passed(await self._control.state()):
            self._beat()
            await asyncio.sleep(LOOK_S)

    def body(self, model: str, ask: Ask) -> dict[str, Any]:
        """The request of vLLM's /v1/completions."""
        return {
            "model": model,
            "prompt": list(ask.prompt_ids),
            "n": self._plan.samples,
            "seed": ask.seed,
            "temperature": self._plan.temperature,
            "max_tokens": self._plan.max_answer_tokens,
            "logprobs": 0,
            "return_token_ids": True,
        }

    async def _episodes(
        self,
        client: httpx.AsyncClient,
        model: str,
        ask: Ask,
        play: Play,
        seats: asyncio.Semaphore,
    ) -> list[Answer] | None:
        """An episode for each sample, all at once; None when vLLM did not answer one of them.

        An episode whose environment raised is an answer without tokens.
        """

        async def one(number: int) -> Answer:
            seed = f"{ask.seed}/{number}"
            sample = sampler(
                client, model, temperature=self._plan.temperature, seed=seed, what="a rollout"
            )

            async def in_turn(ids: Sequence[int], most: int, turn: int) -> Turn:
                await self._let_users_pass()
                said = await sample(ids, most, turn)
                self._beat()
                return said

            async with seats:
                way = await play(in_turn)
            if way is None:
                return Answer([], [], "")
            return Answer(way.token_ids, way.logprobs, "", way)

        try:
            return await together(one(number) for number in range(self._plan.samples))
        except ServingError:
            return None

    async def _runs(self, model: str, ask: Ask, run: Run) -> list[Answer] | None:
        """A run for each sample; None when vLLM lost one of them.

        A run that failed, or that nothing can be learnt from, is an answer without tokens.
        """

        async def one(number: int) -> Answer:
            way = None
            seed = hashlib.sha256(f"{ask.seed}/{number}".encode()).digest()
            try:
                way = await run(
                    model,
                    int.from_bytes(seed[:4], "big"),
                    temperature=self._plan.temperature,
                    max_answer_tokens=self._plan.max_answer_tokens,
                    wait=self._let_users_pass,
                )
            except EnvironmentFault as fault:
                self._faults.append(fault)
            self._beat()
            return (
                Answer([], [], "") if way is None else Answer(way.token_ids, way.logprobs, "", way)
            )

        try:
            return await together(one(number) for number in range(self._plan.samples))
        except ServingError:
            return None

    async def _ask(self, client: httpx.AsyncClient, model: str, ask: Ask) -> list[Answer] | None:
        try:
            response = await client.post(
                "/v1/completions", json=self.body(model, ask), headers=UNCAPTURED
            )
        except httpx.HTTPError:
            return None
        if response.status_code != httpx.codes.OK:
            return None
        choices = sorted(response.json()["choices"], key=lambda choice: int(choice["index"]))
        return [
            Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["text"])
            for choice in choices
        ]
