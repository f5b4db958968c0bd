"""Evaluation of a candidate on this node's environments.

In: two served versions, tasks to leave out and to take. Out: per environment paired counts, or
paired log-probabilities of its texts; tasks, texts and answers stay here. Candidate and reference
answer the same held-out tasks, play their episodes or are asked by agents, in one run, by the
node's own vLLM: greedily, or with several sampled attempts that share their seeds. A request that
fails for a reason of infrastructure makes the node abstain, never look like a lost skill.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import httpx

from edge_node.agent_runs import AgentRuns
from edge_node.environments import (
    Agents,
    AnyEnvironment,
    Document,
    Environment,
    Episodes,
    Task,
    TextEnvironment,
    in_own_thread,
)
from edge_node.episodes import Rules, run_episode, sampler
from edge_node.errors import EnvironmentFault, SettingsError
from edge_node.releases.asking import CONCURRENCY, ask
from edge_node.releases.likelihood import compare_likelihood
from edge_node.serving import ControlClient
from edge_node.settings import EnvironmentSpec
from lorikeet.together import together
from protos.manifest import canonical_json, sha256_hex
from protos.releases.v1 import releases_pb2

log = logging.getLogger(__name__)
T = TypeVar("T", Task, Document)
Attempt = Callable[[Task, int], Awaitable[bool]]
"""(task, number of the attempt) -> whether it passed."""


def evaluation_seed(node_id: str) -> int:
    """Seed of a node's held-out tasks, always the same.

    Nodes that measure one environment (the anchor above all) have different tasks, so that together
    they are more evidence.
    """
    return _seed(f"evaluation/{node_id}")


@dataclass(frozen=True)
class Sampling:
    """How a task is answered: one greedy answer, or `attempts` sampled ones at `temperature`."""

    attempts: int = 1
    temperature: float = 0.0


@dataclass(frozen=True)
class Evaluator:
    """`environments` are this node's, by name; `seed` chooses the held-out tasks."""

    requests: Callable[[int], AbstractAsyncContextManager[httpx.AsyncClient]]
    """`ControlClient.requests`: opens a client of the node's vLLM with at most so many connections.

    It sets no deadline: the offer's holds for all, and a vLLM that hangs is restarted.
    """
    environments: Mapping[str, tuple[EnvironmentSpec, Callable[[], AnyEnvironment]]]
    """By name, each with `EnvironmentProcess.environment`."""
    seed: int = 0
    max_answer_tokens: int | None = None
    """EDGE_RELEASES__MAX_ANSWER_TOKENS."""
    rules: Callable[[], Rules] | None = None
    """Reads those of episodes; blocks. A node without environments of tools needs none."""
    control: ControlClient | None = None
    """Opens the sessions of agents. A node without environments of agents needs none."""
    runs: dict[str, AgentRuns] = field(default_factory=dict)
    """Of agents, by the environment's name: all offers share the bound of its runs at once."""

    async def compare(
        self,
        name: str,
        candidate: str,
        reference: str,
        first_task: int,
        tasks: int,
        sampling: Sampling,
    ) -> releases_pb2.EnvironmentResult:
        """Paired outcomes of the served versions `candidate` and `reference` on held-out tasks.

        They are `tasks` tasks, or documents, after the first `first_task`; fewer where there are no
        more. Texts are read once, whatever `sampling` says.

        Raises:
            ServingError: a request failed; no result is complete.
            EnvironmentFault: the environment raised, hung, crashed or broke its contract.
            NoLikelihood: a document has no finite log-probability.
        """
        spec, load = self.environments[name]
        environment = await in_own_thread(load)
        if isinstance(environment, TextEnvironment):
            documents = await in_own_thread(
                _suite, name, environment.documents, self.seed, first_task, tasks
            )
            async with self.requests(CONCURRENCY) as client:
                likelihood = await compare_likelihood(client, candidate, reference, name, documents)
            return releases_pb2.EnvironmentResult(
                environment=name,
                tasks_digest=_digest(documents),
                anchor=spec.anchor,
                first_task=first_task,
                attempts=1,
                likelihood=likelihood,
            )
        suite = await in_own_thread(_suite, name, environment.tasks, self.seed, first_task, tasks)
        attempt = await self._attempt(name, environment, sampling)
        async with self.requests(CONCURRENCY) as client:
            with_candidate, with_reference = await together(
                _passed(partial(attempt, client, model), suite, sampling)
                for model in (candidate, reference)
            )
        pairs = list(zip(with_reference, with_candidate, strict=True))
        every = None
        if sampling.attempts > 1:
            every = _outcomes([(all(a), all(b)) for a, b in pairs])
        first = _outcomes([(a[0], b[0]) for a, b in pairs])
        return releases_pb2.EnvironmentResult(
            environment=name,
            tasks_digest=_digest(suite),
            anchor=spec.anchor,
            both_passed=first.both_passed,
            only_reference_passed=first.only_reference_passed,
            only_candidate_passed=first.only_candidate_passed,
            neither_passed=first.neither_passed,
            first_task=first_task,
            attempts=sampling.attempts,
            every_attempt=every,
        )

    async def _attempt(
        self, name: str, environment: Environment | Episodes | Agents, sampling: Sampling
    ) -> Callable[[httpx.AsyncClient, str, Task, int], Awaitable[bool]]:
        """How one attempt at a task of `environment` is made and judged."""
        if isinstance(environment, Environment):
            return partial(self._answer, environment, sampling)
        if isinstance(environment, Agents):
            return partial(self._run, name, environment, sampling)
        assert self.rules is not None
        rules = await in_own_thread(self.rules)
        try:
            rules.renderer.expect_tools(environment.schemas)
        except SettingsError as error:
            raise EnvironmentFault(name, f"Environment {name!r} has tools. {error}") from error
        return partial(self._play, name, environment, rules, sampling)

    async def _answer(
        self,
        environment: Environment,
        sampling: Sampling,
        client: httpx.AsyncClient,
        model: str,
        task: Task,
        attempt: int,
    ) -> bool:
        answer = await self._ask(client, model, task, attempt, sampling)
        return (await in_own_thread(environment.verify, task, answer)).passed

    async def _play(
        self,
        name: str,
        episodes: Episodes,
        rules: Rules,
        sampling: Sampling,
        client: httpx.AsyncClient,
        model: str,
        task: Task,
        attempt: int,
    ) -> bool:
        # The same seeds for candidate and reference, as in `_ask`.
        sample = sampler(
            client,
            model,
            temperature=sampling.temperature if sampling.attempts > 1 else 0,
            seed=f"attempt/{self.seed}/{task.id}/{attempt}",
            what=f"task {task.id}",
        )
        way = await run_episode(rules, episodes, task, sample)
        if way.reward is None:
            raise EnvironmentFault(
                name, f"Environment {name!r} gave no reward for a held-out task.", raised=True
            )
        return way.passed

    async def _run(
        self,
        name: str,
        agents: Agents,
        sampling: Sampling,
        client: httpx.AsyncClient,
        model: str,
        task: Task,
        attempt: int,
    ) -> bool:
        assert self.control is not None
        spec, _ = self.environments[name]
        if name not in self.runs:
            self.runs[name] = AgentRuns(self.control, spec, agents)
        end = await self.runs[name].run(
            task,
            model,
            seed=_seed(f"attempt/{self.seed}/{task.id}/{attempt}"),
            temperature=sampling.temperature if sampling.attempts > 1 else 0.0,
            max_answer_tokens=self.max_answer_tokens,
        )
        if end.reward is None:
            raise EnvironmentFault(
                name, f"Environment {name!r} gave no reward for a held-out task.", raised=True
            )
        return end.reward == 1

    async def _ask(
        self, client: httpx.AsyncClient, model: str, task: Task, attempt: int, sampling: Sampling
    ) -> str:
        body = {"model": model, "messages": task.messages, "temperature": 0}
        if self.max_answer_tokens is not None:
            body["max_tokens"] = self.max_answer_tokens
        if sampling.attempts > 1:
            # The same seeds for candidate and reference: only their weights differ.
            body |= {
                "temperature": sampling.temperature,
                "seed": _seed(f"attempt/{self.seed}/{task.id}/{attempt}"),
            }
        document = await ask(client, "/v1/chat/completions", body, f"task {task.id}")
        return str(document["choices"][0]["message"]["content"] or "")


async def _passed(attempt: Attempt, suite: Sequence[Task], sampling: Sampling) -> list[list[bool]]:
    """Per task, whether each attempt passed. A task's attempts end with the first failure."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(task: Task) -> list[bool]:
        passed: list[bool] = []
        while len(passed) < sampling.attempts and all(passed):
            async with gate:
                passed.append(await attempt(task, len(passed)))
        return passed

    return await together(one(task) for task in suite)


def _suite(
    name: str,
    draw: Callable[..., Sequence[T]],
    seed: int,
    first: int,
    count: int,
) -> Sequence[T]:
    """`count` held-out tasks or documents after the first `first`."""
    if first == 0:
        return draw("held_out", count=count, seed=seed)
    try:
        before = draw("held_out", count=first, seed=seed)
        longer = draw("held_out", count=first + count, seed=seed)
    except EnvironmentFault as error:
        if not error.raised:
            raise
        # It gave some before: it has no more, and says so in whatever way.
        log.info("no further tasks", extra={"environment": name, "why": str(error)})
        return ()
    if [item.id for item in longer[: len(before)]] != [item.id for item in before]:
        log.warning(
            "the environment's longer suites do not begin with its shorter ones",
            extra={"environment": name},
        )
        return ()
    return longer[first:]


def _digest(suite: Sequence[T]) -> str:
    # Sorted: the same tasks in another order are no further evidence.
    return sha256_hex(canonical_json(sorted(item.id for item in suite)))


def _outcomes(pairs: Sequence[tuple[bool, bool]]) -> releases_pb2.PairedOutcomes:
    """Counts of (reference passed, candidate passed)."""
    return releases_pb2.PairedOutcomes(
        both_passed=pairs.count((True, True)),
        only_reference_passed=pairs.count((True, False)),
        only_candidate_passed=pairs.count((False, True)),
        neither_passed=pairs.count((False, False)),
    )


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
