"""The local gate: a round of any method sends nothing when the node's environments fall by it.

In: a trained increment, the node's environments, its vLLM. Out: counts for the manifest; NoGain,
which says what fell. The policy (release and increment) and its start answer the same held-out
tasks through the serving path, those of anchors too: greedily (pass^1), and several times, where
all answers must pass (pass^k, arXiv:2406.12045). Texts are compared by their log-probability. It
keeps a node from sending what hurts; central's gate decides with more tasks and other ones.
Guarantees: what cannot be judged stops no round, and status says so. (Importing this module loads
torch.)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from edge_node.base_model import read_base
from edge_node.environments import Agents, AnyEnvironment, EnvironmentProcess
from edge_node.episodes import read_rules
from edge_node.errors import ServingError
from edge_node.learning.plans import RoundPlan
from edge_node.learning.policies import Policies, read_release, sweep
from edge_node.learning.records import NoGain
from edge_node.learning.rollouts import beating
from edge_node.learning.steering import RoundPaused
from edge_node.learning.training import RoundObsolete
from edge_node.learning.verdict import Compared, Verdict, read_result
from edge_node.learning.workplace import Workplace
from edge_node.problems import Problems
from edge_node.releases.evaluation import Evaluator, Sampling
from edge_node.releases.trouble import words
from edge_node.serving import ControlClient, control_socket
from edge_node.settings import EdgeSettings, EnvironmentSpec
from protos.lora import LoraTensors

log = logging.getLogger(__name__)

ROOM = "local-gate"
"""Name under which the gate reports problems."""
PATIENCE_S = 600.0
"""How long a round waits for a vLLM that does not answer: longer than one takes to start."""
RETRY_S = 1.0
TRIES = 3
"""Of one environment, while vLLM answers; then it is not judged."""

T = TypeVar("T")
Loaded = Mapping[str, tuple[EnvironmentSpec, Callable[[], AnyEnvironment]]]


def pass_local_gate(
    plan: RoundPlan, settings: EdgeSettings, place: Workplace, increment: LoraTensors
) -> dict[str, float]:
    """Counts for the manifest; empty where there is nothing to ask.

    An environment of agents is not asked: each of its runs may take minutes.

    Raises:
        NoGain: an environment fell.
        ServingError: vLLM does not answer.
        RoundCancelled, RoundObsolete, RoundPaused: `place` said so.
    """
    problems = Problems(settings.data_dir)
    if not settings.learning.gate.tasks or not settings.environments:
        problems.clear(ROOM)  # of the settings of before
        return {}
    rank, most = plan.release_rank + plan.rank, settings.serving.max_lora_rank
    if rank > most:
        problems.report(
            ROOM,
            f"Rounds are sent unjudged: release and increment have rank {rank} together, and this "
            f"node serves adapters up to rank {most}.",
            "Raise EDGE_SERVING__MAX_LORA_RANK or lower EDGE_LEARNING__RANK, or set "
            "EDGE_LEARNING__GATE__TASKS to 0; then restart the node.",
        )
        return Verdict([], len(settings.environments)).metrics()
    if place.steering.must_pause():  # it goes to its end, once it has begun
        place.steering.pauses()
        raise RoundPaused("before the local gate")
    compared, unjudged = _compare_all(plan, settings, place, increment)
    if place.obsolete():  # what was deleted meanwhile is no reason against what is left
        raise RoundObsolete("after the local gate")
    verdict = Verdict(compared, len(unjudged))
    if falls := verdict.falls(settings.learning.gate):
        text = f"the local gate stops it: {'; '.join(map(str, falls))}"
        problems.report(
            ROOM,
            f"Round {plan.round_id} sent nothing, {text}",
            "The next round starts by itself after further feedback. If it is stopped too, look at "
            "that feedback, add anchors, or lower EDGE_LEARNING__LEARNING_RATE.",
        )
        raise NoGain(text)
    if unjudged:
        name, why = next(iter(unjudged.items()))
        problems.report(
            ROOM,
            f"Round {plan.round_id} was not judged on {', '.join(unjudged)}. {why}",
            f"Run `edge-node environments check {name}`, and see logs/vllm.log.",
        )
    else:
        problems.clear(ROOM)
    return verdict.metrics()


@dataclass(frozen=True)
class _Policy:
    """What is judged, as vLLM gets it."""

    control: ControlClient
    policies: Policies
    step: int
    increment: LoraTensors
    start: str
    served: Path

    async def names(self) -> tuple[str, str]:
        """Loads policy and start; a vLLM that was started anew has neither. Raises ServingError."""
        await self.control.load(self.start, self.served)
        return await self.policies.publish(self.step, self.increment), self.start


def _compare_all(
    plan: RoundPlan, settings: EdgeSettings, place: Workplace, increment: LoraTensors
) -> tuple[list[Compared], dict[str, str]]:
    """The comparisons, and of each environment that was not judged why."""
    assert place.served is not None
    base = read_base(settings)
    control = ControlClient(control_socket(settings.data_dir))
    folder = settings.data_dir / "learning" / "policies"
    release = LoraTensors() if place.release is None else read_release(place.release)
    policy = _Policy(
        control,
        Policies(folder, control, plan.round_id, release, base.module_shapes),
        plan.steps,
        increment,
        f"{settings.serving.alias}@{plan.label}",
        place.served,
    )
    longest = settings.releases.max_answer_tokens
    if plan.method == "grpo" and plan.grpo is not None:
        longest = plan.grpo.max_answer_tokens
    compared: list[Compared] = []
    unjudged: dict[str, str] = {}
    with ExitStack() as held:
        loaded = {
            spec.name: (spec, held.enter_context(EnvironmentProcess(spec)).environment)
            for spec in settings.environments
        }
        rules = partial(read_rules, settings, base.path, longest)
        evaluator = Evaluator(control.requests, loaded, plan.seed, longest, rules)
        try:
            patiently(lambda: sweep(folder, control), place.beat)
            for name, (_, load) in loaded.items():
                place.steering.expect_wanted()
                if place.obsolete():
                    raise RoundObsolete(f"before the local gate asked {name}")
                place.steering.let_users_pass()
                place.beat()
                try:
                    if isinstance(load(), Agents):
                        continue
                    ask = partial(_compare, evaluator, name, policy, settings, place)
                    compared += _tried(ask, control, place.beat)
                except Exception as error:  # a chat template may raise anything on its messages
                    if isinstance(error, ServingError) and not _answers(control):
                        raise
                    unjudged[name] = words(error)
        finally:
            # Of use, and no more: what a vLLM that is away still holds, the next round sweeps.
            with suppress(ServingError):
                asyncio.run(sweep(folder, control))
    return compared, unjudged


async def _compare(
    evaluator: Evaluator,
    name: str,
    policy: _Policy,
    settings: EdgeSettings,
    place: Workplace,
) -> list[Compared]:
    gate = settings.learning.gate
    candidate, start = await policy.names()
    async with beating(policy.control, place.beat):
        first = await evaluator.compare(name, candidate, start, 0, gate.tasks, Sampling())
        found = [read_result(first)]
        if gate.attempts > 1 and not found[0].is_text:
            sampling = Sampling(gate.attempts, gate.temperature)
            several = await evaluator.compare(name, candidate, start, 0, gate.tasks, sampling)
            found.append(read_result(several, every=True))
    return [one for one in found if one.tasks]


def _tried(
    compare: Callable[[], Awaitable[list[Compared]]],
    control: ControlClient,
    beat: Callable[[], None],
) -> list[Compared]:
    """What `compare` gives at the latest at the last of TRIES; raises its ServingError."""
    for _ in range(TRIES - 1):
        patiently(control.state, beat)
        with suppress(ServingError):
            return asyncio.run(_awaited(compare))
        time.sleep(RETRY_S)
    patiently(control.state, beat)
    return asyncio.run(_awaited(compare))


def _answers(control: ControlClient) -> bool:
    try:
        asyncio.run(_awaited(control.state))
    except ServingError:
        return False
    return True


def patiently(call: Callable[[], Awaitable[T]], beat: Callable[[], None]) -> T:
    """The result of `call`, which is tried again for PATIENCE_S while vLLM does not answer.

    Raises the last ServingError.
    """
    ends = time.monotonic() + PATIENCE_S
    while True:
        try:
            return asyncio.run(_awaited(call))
        except ServingError:
            if time.monotonic() > ends:
                raise
        beat()
        time.sleep(RETRY_S)


async def _awaited(call: Callable[[], Awaitable[T]]) -> T:
    return await call()
