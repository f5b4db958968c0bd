"""Evaluation of a candidate on this node's environments.

In: an offer of central, two served versions. Out: paired counts per environment; tasks and answers stay here.
Candidate and reference answer the same held-out tasks greedily, in one run, through the node's own endpoint; a request
that fails for a reason of infrastructure makes the node abstain, never look like a lost skill.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx

from edge_node.environments import Environment, Task
from edge_node.errors import ServingError
from edge_node.settings import EnvironmentSpec
from protos.manifest import canonical_json, sha256_hex
from protos.releases.v1 import releases_pb2

CONCURRENCY = 32


def evaluation_seed(node_id: str) -> int:
    """A node's own held-out tasks, always the same: where several nodes measure one environment (the anchor above all),
    their tasks differ, so that together they are more evidence."""
    return int.from_bytes(hashlib.sha256(f"evaluation/{node_id}".encode()).digest()[:4], "big")


@dataclass(frozen=True)
class Evaluator:
    """Asks the node's own endpoint at `url`; `environments` are this node's, by name; `seed` chooses the held-out tasks."""

    url: str
    environments: Mapping[str, tuple[EnvironmentSpec, Environment]]
    seed: int = 0

    async def compare(self, candidate: str, reference: str, tasks: int) -> list[releases_pb2.EnvironmentResult]:
        """Paired outcomes of the served versions `candidate` and `reference` on `tasks` held-out tasks an environment.

        Raises:
            ServingError: a request failed; no result is complete.
        """
        results = []
        limits = httpx.Limits(max_connections=CONCURRENCY)
        # No deadline per request: the offer's holds for all, and a vLLM that hangs is restarted. And no proxy of the
        # environment: tasks do not leave this machine.
        async with httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits, trust_env=False) as client:
            for name, (spec, environment) in sorted(self.environments.items()):
                suite = await asyncio.to_thread(environment.tasks, "held_out", count=tasks, seed=self.seed)
                passed_candidate, passed_reference = await asyncio.gather(
                    self._passed(client, candidate, environment, suite),
                    self._passed(client, reference, environment, suite),
                )
                pairs = list(zip(passed_reference, passed_candidate, strict=True))
                results.append(
                    releases_pb2.EnvironmentResult(
                        environment=name,
                        tasks_digest=sha256_hex(canonical_json([task.id for task in suite])),
                        anchor=spec.anchor,
                        both_passed=pairs.count((True, True)),
                        only_reference_passed=pairs.count((True, False)),
                        only_candidate_passed=pairs.count((False, True)),
                        neither_passed=pairs.count((False, False)),
                    )
                )
        return results

    async def _passed(
        self, client: httpx.AsyncClient, model: str, environment: Environment, suite: Sequence[Task]
    ) -> list[bool]:
        gate = asyncio.Semaphore(CONCURRENCY)

        async def one(task: Task) -> bool:
            async with gate:
                answer = await self._ask(client, model, task)
            return (await asyncio.to_thread(environment.verify, task, answer)).passed

        return await asyncio.gather(*(one(task) for task in suite))

    async def _ask(self, client: httpx.AsyncClient, model: str, task: Task) -> str:
        # No max_tokens: the model's own end or its context length ends an answer, as for a client that sets none.
        body = {"model": model, "messages": task.messages, "temperature": 0}
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
