"""Evaluation of a candidate on this node's environments.

In: two served versions, tasks to leave out and to take. Out: paired counts per environment; tasks and answers stay here.
Candidate and reference answer the same held-out tasks, in one run, by the node's own vLLM: greedily,
or with several sampled attempts that share their seeds. A request that fails for a reason of infrastructure makes the node abstain, never look like
a lost skill.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import httpx

from edge_node.environments import Environment, Task
from edge_node.errors import EnvironmentFault, ServingError
from edge_node.settings import EnvironmentSpec
from protos.manifest import canonical_json, sha256_hex
from protos.releases.v1 import releases_pb2

log = logging.getLogger(__name__)

CONCURRENCY = 32


def evaluation_seed(node_id: str) -> int:
    """A node's own held-out tasks, always the same: where several nodes measure one environment (the anchor above all),
    their tasks differ, so that together they are more evidence."""
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
    """`ControlClient.requests`: opens a client of the node's own vLLM, for at most so many connections.

    It sets no deadline: the offer's holds for all, and a vLLM that hangs is restarted."""
    environments: Mapping[str, tuple[EnvironmentSpec, Environment]]
    seed: int = 0

    async def compare(
        self, name: str, candidate: str, reference: str, first_task: int, tasks: int, sampling: Sampling
    ) -> releases_pb2.EnvironmentResult:
        """Paired outcomes of the served versions `candidate` and `reference` on `tasks` held-out tasks after the first
        `first_task`; fewer where the environment has no more.

        Raises:
            ServingError: a request failed; no result is complete.
            EnvironmentFault: the environment raised.
        """
        spec, environment = self.environments[name]
        suite = await asyncio.to_thread(self._suite, name, environment, first_task, tasks)
        async with self.requests(CONCURRENCY) as client:
            with_candidate, with_reference = await asyncio.gather(
                self._passed(client, candidate, name, suite, sampling),
                self._passed(client, reference, name, suite, sampling),
            )
        pairs = list(zip(with_reference, with_candidate, strict=True))
        every = None
        if sampling.attempts > 1:
            every = _outcomes([(all(a), all(b)) for a, b in pairs])
        first = _outcomes([(a[0], b[0]) for a, b in pairs])
        return releases_pb2.EnvironmentResult(
            environment=name,
            # Sorted: the same tasks in another order are no further evidence.
            tasks_digest=sha256_hex(canonical_json(sorted(task.id for task in suite))),
            anchor=spec.anchor,
            both_passed=first.both_passed,
            only_reference_passed=first.only_reference_passed,
            only_candidate_passed=first.only_candidate_passed,
            neither_passed=first.neither_passed,
            first_task=first_task,
            attempts=sampling.attempts,
            every_attempt=every,
        )

    def _suite(self, name: str, environment: Environment, first_task: int, tasks: int) -> Sequence[Task]:
        if first_task == 0:
            try:
                return environment.tasks("held_out", count=tasks, seed=self.seed)
            except Exception as error:  # a plug-in may raise anything
                raise EnvironmentFault(name, "tasks", error) from error
        try:
            before = environment.tasks("held_out", count=first_task, seed=self.seed)
            longer = environment.tasks("held_out", count=first_task + tasks, seed=self.seed)
        except Exception as error:  # it gave tasks before: it has no more, and says so in whatever way
            log.info("no further tasks", extra={"environment": name, "why": type(error).__name__})
            return ()
        if [task.id for task in longer[: len(before)]] != [task.id for task in before]:
            log.warning(
                "the environment's longer suites do not begin with its shorter ones", extra={"environment": name}
            )
            return ()
        return longer[first_task:]

    async def _passed(
        self, client: httpx.AsyncClient, model: str, name: str, suite: Sequence[Task], sampling: Sampling
    ) -> list[list[bool]]:
        """Per task whether each attempt passed; those after a failed one are not made, as not all can pass any more."""
        gate = asyncio.Semaphore(CONCURRENCY)

        async def one(task: Task) -> list[bool]:
            passed: list[bool] = []
            while len(passed) < sampling.attempts and all(passed):
                async with gate:
                    answer = await self._ask(client, model, task, len(passed), sampling)
                passed.append(await asyncio.to_thread(self._verify, name, task, answer))
            return passed

        return await asyncio.gather(*(one(task) for task in suite))

    def _verify(self, name: str, task: Task, answer: str) -> bool:
        try:
            return bool(self.environments[name][1].verify(task, answer).passed)
        except Exception as error:  # a plug-in may raise anything
            raise EnvironmentFault(name, "verify", error) from error

    async def _ask(self, client: httpx.AsyncClient, model: str, task: Task, attempt: int, sampling: Sampling) -> str:
        # No max_tokens: the model's own end or its context length ends an answer, as for a client that sets none.
        body = {"model": model, "messages": task.messages, "temperature": 0}
        if sampling.attempts > 1:
            # The same seeds for candidate and reference: their attempts differ by their weights alone.
            body |= {"temperature": sampling.temperature, "seed": _seed(f"attempt/{self.seed}/{task.id}/{attempt}")}
        try:
            response = await client.post("/v1/chat/completions", json=body, headers={"x-lorikeet-capture": "off"})
        except httpx.HTTPError as error:
            raise ServingError(f"vLLM did not answer an evaluation request for {model}: {error!r}.") from error
        if response.status_code != httpx.codes.OK:
            # Not vLLM's words: they might quote the prompt, and the reason goes to the log and to central.
            raise ServingError(
                f"vLLM answered {response.status_code} to an evaluation request for {model}, task {task.id}."
            )
        document = response.json()
        if document["model"] != model:
            raise ServingError(f"Evaluation asked for {model} and was answered by {document['model']}.")
        return str(document["choices"][0]["message"]["content"] or "")


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
