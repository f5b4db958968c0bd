"""A grpo round from its plan to the increment: gathers what it needs of the node, trains, measures.

In: a RoundPlan with its GrpoPlan, settings, the node's vLLM. Out: a TrainedRound whose policy is
better than its start on held-out tasks; otherwise NoGain. Importing this module loads torch.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from edge_node.agent_runs import ROOM, AgentRuns
from edge_node.base_model import longest_context, read_base
from edge_node.environments import (
    Agents,
    Environment,
    EnvironmentProcess,
    Episodes,
    Split,
    Task,
    by_weight,
)
from edge_node.episodes import Rules
from edge_node.errors import EnvironmentFault, ServingError, SettingsError
from edge_node.experience import open_experience
from edge_node.learning import gain
from edge_node.learning.anchors import Anchors
from edge_node.learning.gate import patiently
from edge_node.learning.grpo import train_grpo
from edge_node.learning.plans import GrpoPlan, RoundPlan
from edge_node.learning.policies import Policies, read_release, sweep
from edge_node.learning.records import NoGain, RoundImpossible
from edge_node.learning.rewards import Exercise
from edge_node.learning.rollouts import VllmRollouts
from edge_node.learning.round import or_deleted, training_anchors
from edge_node.learning.training import TrainedRound
from edge_node.learning.warm import warm_lessons, warm_start
from edge_node.learning.workplace import Workplace
from edge_node.problems import Problems
from edge_node.releases.trouble import next_step
from edge_node.rendering import ChatFormat, Renderer, load_renderer
from edge_node.serving import ControlClient, control_socket
from edge_node.settings import EdgeSettings
from protos.lora import LoraTensors

Judging = Environment | Episodes | AgentRuns


def train_on_verifiers(plan: RoundPlan, settings: EdgeSettings, place: Workplace) -> TrainedRound:
    """Train by reinforcement, with rollouts from this node's vLLM.

    Raises:
        SettingsError: unusable anchors.
        EnvironmentFault: an environment does not work.
        NoGain: the policy is no better than its start; NothingToGain: and never will be.
        RoundImpossible: the settings are others by now, tasks are unusable, or no verifier gives a
            reward.
        ServingError: vLLM does not answer.
        RoundCancelled, RoundPaused: `place.steering` said so.
    """
    assert plan.grpo is not None
    _expect_wanted(plan, settings)
    with ExitStack() as held:
        environments = _environments(plan.grpo, settings, held)
        return _train(plan, settings, place, environments)


def _train(
    plan: RoundPlan,
    settings: EdgeSettings,
    place: Workplace,
    environments: Mapping[str, Judging],
) -> TrainedRound:
    assert plan.grpo is not None
    served, base = place.served, read_base(settings)
    assert served is not None
    control = ControlClient(control_socket(settings.data_dir))
    renderer = load_renderer(base.path, ChatFormat.read(settings.data_dir))
    longest = plan.grpo.max_answer_tokens
    limit = longest_context(settings, base.path)
    exercises = make_exercises(plan, environments, renderer, limit)
    held_out = make_held_out(plan, environments, renderer, limit)
    start = LoraTensors() if place.release is None else read_release(place.release)
    folder = settings.data_dir / "learning" / "policies"
    policies = Policies(folder, control, plan.round_id, start, base.module_shapes)
    warm = plan.grpo.warm
    anchors = training_anchors(settings, base, plan) if plan.anchors or warm else []
    known, warming = {}, None
    if warm is not None:
        store = open_experience(settings)
        place = or_deleted(store, plan, place)
        stored = store.examples(up_to=warm.cursor, limit=plan.max_examples)
        lessons = warm_lessons(exercises, renderer, longest, stored, place.beat)
        warming = partial(warm_start, plan, place, lessons=lessons, anchors=anchors)
        known = {"warm_steps": float(warm.steps), "warm_examples": float(len(lessons))}
    newest = (0, LoraTensors())

    def publish(step: int, increment: LoraTensors) -> str:
        nonlocal newest
        newest = step, increment
        return patiently(lambda: policies.publish(step, increment), place.beat)

    async def measure() -> gain.Gain:
        # A vLLM that was started anew may have neither.
        first = f"{settings.serving.alias}@{plan.label}"
        await control.load(first, served)
        policy = await policies.publish(*newest)
        return await gain.measure(
            control, held_out, start=first, policy=policy, max_tokens=longest, beat=place.beat
        )

    try:
        patiently(lambda: sweep(folder, control), place.beat)
        trained = train_grpo(
            plan,
            place,
            warm=warming,
            samples=anchors if isinstance(anchors, Anchors) else None,
            exercises=exercises,
            rollouts=VllmRollouts(
                control,
                plan.grpo,
                in_flight=settings.learning.grpo.in_flight,
                yield_above=settings.learning.grpo.yield_above,
                yield_first_token_s=settings.learning.yield_first_token_s,
                yield_at_most_s=settings.learning.yield_at_most_s,
                beat=place.beat,
                trouble=partial(_tell, settings, plan),
            ),
            publish=publish,
        )
        found = patiently(measure, place.beat)
    finally:
        # Of use, and no more: what a vLLM that is away still holds, the next round sweeps.
        with suppress(ServingError):
            asyncio.run(sweep(folder, control))
    if not found.is_one:
        raise NoGain(
            f"on {found.tasks} held-out tasks the policy scores {found.policy:.3g} in the mean and "
            f"its start {found.start:.3g}: {found.better} better, {found.worse} worse"
        )
    return replace(trained, metrics=trained.metrics | known | found.metrics())


def make_exercises(
    plan: RoundPlan, environments: Mapping[str, Judging], renderer: Renderer, limit: int
) -> list[Exercise]:
    """steps x prompts train tasks, the environments in turns; each again where there are too few.

    Where tasks of an environment differ in weight, they are drawn by it.

    A task whose prompt leaves no room for the longest answer is left out; raises RoundImpossible
    when an environment has no other.
    """
    assert plan.grpo is not None
    wanted = plan.steps * plan.grpo.prompts
    rendered = _rendered(plan, "train", wanted, environments, renderer, limit)
    pools = [
        by_weight(pool, [one.task.weight for one in pool], -(-wanted // len(rendered)), plan.seed)
        for pool in rendered
    ]
    exercises = []
    for number in range(wanted):
        pool = pools[number % len(pools)]
        exercise = pool[number // len(pools) % len(pool)]
        exercises.append(replace(exercise, seed=_seed(f"{plan.seed}/{number}")))
    return exercises


def make_held_out(
    plan: RoundPlan, environments: Mapping[str, Judging], renderer: Renderer, limit: int
) -> list[Exercise]:
    """Held-out tasks for the local gate, from all environments; left out and raised as above."""
    pools = _rendered(plan, "held_out", gain.TASKS, environments, renderer, limit)
    return [exercise for pool in pools for exercise in pool]


def _rendered(
    plan: RoundPlan,
    split: Split,
    count: int,
    environments: Mapping[str, Judging],
    renderer: Renderer,
    limit: int,
) -> list[list[Exercise]]:
    """An equal share of `count` tasks from each environment."""
    assert plan.grpo is not None
    share, room = -(-count // len(environments)), limit - plan.grpo.max_answer_tokens
    pools = []
    for name, environment in environments.items():
        tasks = environment.tasks(split, count=share, seed=plan.seed)
        if isinstance(environment, AgentRuns):
            fit = [Exercise(name, environment, task, (), 0) for task in tasks]
        else:
            exercises = _with_prompts(plan, name, environment, tasks, renderer, limit)
            fit = [one for one in exercises if len(one.prompt_ids) <= room]
        if not fit:
            raise RoundImpossible(
                f"Environment {name!r} has rollouts, and of its {len(tasks)} {split} tasks none "
                f"leaves room for an answer: prompts may have {room} tokens here.",
                "Let it have shorter tasks, lower EDGE_LEARNING__GRPO__MAX_ANSWER_TOKENS, or set "
                "its rollouts to false; then restart the node.",
            )
        pools.append(fit)
    return pools


def _with_prompts(
    plan: RoundPlan,
    name: str,
    environment: Environment | Episodes,
    tasks: Sequence[Task],
    renderer: Renderer,
    limit: int,
) -> list[Exercise]:
    assert plan.grpo is not None
    rules, tools = None, None
    if isinstance(environment, Episodes):
        tools = environment.schemas
        _expect_tools(renderer, name, tools)
        longest = plan.grpo.max_answer_tokens
        rules = Rules(renderer, plan.grpo.max_turns, longest, limit)
    return [
        Exercise(name, environment, task, _ids(renderer, name, task, tools), 0, rules)
        for task in tasks
    ]


def _expect_tools(renderer: Renderer, name: str, tools: Sequence[Mapping[str, Any]]) -> None:
    try:
        renderer.expect_tools(tools)
    except SettingsError as error:
        raise RoundImpossible(
            f"Environment {name!r} has rollouts and tools. {error}",
            "Give vLLM another chat template, or set its rollouts to false; then restart the node.",
        ) from error


def _ids(
    renderer: Renderer, name: str, task: Task, tools: Sequence[Mapping[str, Any]] | None
) -> Sequence[int]:
    try:
        return renderer.prompt_ids(task.messages, tools)
    except SettingsError:
        raise
    except Exception as error:  # the template decides what it takes, and raises what it likes
        # Not its words, which may quote the task.
        raise RoundImpossible(
            f"Environment {name!r} has rollouts, and the chat template refuses its task "
            f"{task.id!r} with {type(error).__name__}.",
            "Correct the task's messages, or set its rollouts to false; then restart the node.",
        ) from error


def _expect_wanted(plan: RoundPlan, settings: EdgeSettings) -> None:
    """A node that was restarted may have other settings than the plan was made with."""
    then = "Nothing needs to be done: the next round is made with the settings of now."
    if settings.learning.method not in ("auto", "grpo"):
        raise RoundImpossible(
            f"EDGE_LEARNING__METHOD is {settings.learning.method} now, and the round is a grpo "
            "one.",
            then,
        )
    rank, most = plan.release_rank + plan.rank, settings.serving.max_lora_rank
    if rank > most:
        raise RoundImpossible(
            f"The round's policy has rank {rank}, and EDGE_SERVING__MAX_LORA_RANK is {most} now.",
            then,
        )


def _environments(plan: GrpoPlan, settings: EdgeSettings, held: ExitStack) -> dict[str, Judging]:
    """Those of the plan, whose processes end with `held`."""
    specs = {spec.name: spec for spec in settings.environments if spec.rollouts}
    if gone := sorted(set(plan.environments) - set(specs)):
        raise RoundImpossible(
            f"Environment {', '.join(gone)} is not in EDGE_ENVIRONMENTS with rollouts any more.",
            "Nothing needs to be done: the next round asks those that there are.",
        )
    found = {
        name: held.enter_context(EnvironmentProcess(specs[name])).environment()
        for name in plan.environments
    }
    control = ControlClient(control_socket(settings.data_dir))
    most = settings.learning.grpo.in_flight
    environments: dict[str, Judging] = {
        name: AgentRuns(control, specs[name], one, most) if isinstance(one, Agents) else one
        for name, one in found.items()
        if isinstance(one, Environment | Episodes | Agents)
    }
    if texts := sorted(found.keys() - environments.keys()):
        raise RoundImpossible(
            f"Environment {', '.join(texts)} has rollouts, and is one of texts: it judges no "
            "answer.",
            "Set its rollouts to false in EDGE_ENVIRONMENTS, and restart the node.",
        )
    return environments


def _tell(settings: EdgeSettings, plan: RoundPlan, fault: EnvironmentFault | None) -> None:
    """What status shows of an environment of agents, after each step."""
    problems = Problems(settings.data_dir)
    if fault is None:
        problems.clear(ROOM)
    else:
        text = f"Round {plan.round_id} learns nothing from an environment of agents. {fault}"
        problems.report(ROOM, text, next_step(fault))


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
