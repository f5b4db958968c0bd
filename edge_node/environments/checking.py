"""Does an environment keep its contract? For its author, before a node relies on it.

In: an EnvironmentSpec. Out: what was seen, and what is wrong with the next step. Each environment
runs in its worker; a second worker says whether another machine would have the same tasks. No
model, no vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from edge_node.environments.checking_agents import try_agents
from edge_node.environments.checking_levels import Level, levels
from edge_node.environments.contract import (
    Agents,
    AnyEnvironment,
    Document,
    Environment,
    Episodes,
    Split,
    Task,
    TextEnvironment,
)
from edge_node.environments.process import EnvironmentProcess, verify_all
from edge_node.errors import EnvironmentFault, SettingsError
from edge_node.settings import EnvironmentSpec

SEEDS = (0, 1)
GARBAGE = "\x00 {]}) \\ud83d %s ' OR 1=1 \u202e" + "A" * 2000
"""An answer that no task asks for."""
Item = Task | Document


@dataclass(frozen=True)
class Wrong:
    what: str
    next_step: str


@dataclass
class Findings:
    """What a check of one environment saw. Times are milliseconds a call; None: not measured."""

    name: str
    kind: str | None = None
    distinct: dict[str, int] = field(default_factory=dict)
    """Distinct texts by split, over the seeds that were tried."""
    shared: int = 0
    """Texts that are in both splits."""
    reference_answers: int = 0
    """Tasks for which a right answer is known."""
    tools: list[str] = field(default_factory=list)
    """Their names, in the order that a model sees."""
    scores: tuple[float, float] | None = None
    """Lowest and highest that was seen; of an environment with tools, when nothing was called."""
    levels: list[Level] = field(default_factory=list)
    """Rewards by difficulty, where the environment gives one."""
    weights: tuple[float, float] | None = None
    """Lowest and highest of the train tasks, where they differ."""
    tasks_ms: float | None = None
    verify_ms: float | None = None
    """A verdict; of an environment with tools, an episode without a call."""
    wrong: list[Wrong] = field(default_factory=list)

    @property
    def noun(self) -> str:
        return "documents" if self.kind == "texts" else "tasks"


def check_environment(spec: EnvironmentSpec, count: int) -> Findings:
    """Try `count` tasks or documents of each split; never raises for what the environment does."""
    found = Findings(spec.name)
    try:
        with (
            EnvironmentProcess(spec, shows_output=True) as process,
            EnvironmentProcess(spec, shows_output=True) as other,
        ):
            found.kind = process.start()
            _check(found, spec, count, process, other)
    except SettingsError as error:
        found.wrong.append(Wrong(str(error), "Correct EDGE_ENVIRONMENTS."))
    except EnvironmentFault as fault:
        found.wrong.append(Wrong(str(fault), "Correct the environment; stderr has what it prints."))
    return found


def _check(
    found: Findings,
    spec: EnvironmentSpec,
    count: int,
    process: EnvironmentProcess,
    other: EnvironmentProcess,
) -> None:
    environment, elsewhere = process.environment(), other.environment()
    texts: dict[Split, set[str]] = {}
    began, draws = time.perf_counter(), 0
    for split in ("train", "held_out"):
        drawn = {seed: _draw(environment, split, count, seed) for seed in SEEDS}
        draws += len(SEEDS)
        texts[split] = {_text(item) for items in drawn.values() for item in items}
        found.distinct[split] = len(texts[split])
        _check_one_draw(found, split, drawn[SEEDS[0]])
        if split == "train":
            found.tasks_ms = 1000 * (time.perf_counter() - began) / draws
        for again, where in ((environment, "in the same process"), (elsewhere, "in another one")):
            if _draw(again, split, count, SEEDS[0]) != drawn[SEEDS[0]]:
                _wrong(
                    found,
                    f"The same arguments gave other {split} {found.noun} {where}.",
                    "Draw from random.Random with a text of all arguments; never from hash(), a "
                    "set's order, the time or the network.",
                )
        shorter = _draw(environment, split, max(1, count // 2), SEEDS[0])
        if drawn[SEEDS[0]][: len(shorter)] != shorter:
            _wrong(
                found,
                f"{count} {split} {found.noun} do not begin with the {len(shorter)} of a "
                "smaller count.",
                "Draw one after the other, and cut at the count.",
            )
    if not isinstance(environment, TextEnvironment):
        weights = {t.weight for t in environment.tasks("train", count=count, seed=SEEDS[0])}
        found.weights = (min(weights), max(weights)) if len(weights) > 1 else None
    found.shared = len(texts["train"] & texts["held_out"])
    if found.shared:
        _wrong(
            found,
            f"{found.shared} texts are in train and in held_out.",
            "Let a hash of the text decide the split.",
        )
    if isinstance(environment, Environment):
        _check_verdicts(found, spec, process, environment, count)
    elif isinstance(environment, Episodes):
        _check_episodes(found, spec, environment, count)
    elif isinstance(environment, Agents):
        _check_runs(found, environment, count)


def _check_one_draw(found: Findings, split: str, items: Sequence[Item]) -> None:
    if not items:
        _wrong(
            found, f"There are no {split} {found.noun}.", "Make some; the gate needs held-out ones."
        )
    doubles = len(items) - len({_text(item) for item in items})
    if doubles:
        _wrong(
            found,
            f"{doubles} of {len(items)} {split} {found.noun} repeat the text of another.",
            "Leave out texts that were drawn before: a repeated one is no further evidence.",
        )


def _check_verdicts(
    found: Findings,
    spec: EnvironmentSpec,
    process: EnvironmentProcess,
    environment: Environment,
    count: int,
) -> None:
    tasks = [
        task
        for split in ("train", "held_out")
        for task in environment.tasks(split, count=count, seed=SEEDS[0])  # type: ignore[arg-type]
    ]
    known = [(task, environment.reference_answer(task)) for task in tasks]
    right = [(task, answer) for task, answer in known if answer is not None]
    found.reference_answers = len(right)
    if spec.anchor and len(right) < len(tasks):
        _wrong(
            found,
            f"It is an anchor and knows no answer to {len(tasks) - len(right)} of its tasks.",
            "Return one from reference_answer, or set anchor to false.",
        )
    scores: list[float] = []
    rewarded: dict[bool, list[tuple[Task, float]]] = {True: [], False: []}
    began, calls = time.perf_counter(), 0
    tries: list[tuple[str, list[tuple[Task, str]], bool]] = [
        ("the reference answer", right, True),
        ("an empty answer", [(task, "") for task in tasks], False),
        ("a garbage answer", [(task, GARBAGE) for task in tasks], False),
    ]
    for name, answers, expected in tries:
        outcomes = verify_all(process, answers)
        calls += len(answers)
        scores += [outcome.score for outcome in outcomes]
        rewarded[expected] += [
            (task, outcome.score) for (task, _), outcome in zip(answers, outcomes, strict=True)
        ]
        wrong = [
            task.id
            for (task, _), outcome in zip(answers, outcomes, strict=True)
            if outcome.passed != expected
        ]
        if wrong:
            _wrong(
                found,
                f"{name.capitalize()} {'fails' if expected else 'passes'} for {len(wrong)} of "
                f"{len(answers)} tasks, first {wrong[0]!r}.",
                "Correct verify" + (" or reference_answer." if expected else "."),
            )
    if calls:
        found.verify_ms = 1000 * (time.perf_counter() - began) / calls
        found.scores = min(scores), max(scores)
    found.levels = levels(rewarded[True], rewarded[False])


def _check_episodes(found: Findings, spec: EnvironmentSpec, episodes: Episodes, count: int) -> None:
    """An episode of each task in which nothing is called: it must not pass."""
    found.tools = [schema["function"]["name"] for schema in episodes.schemas]
    if spec.anchor:
        _wrong(
            found,
            "It is an anchor, and knows no answers that a round could learn from.",
            "Set anchor to false; the gate measures it all the same.",
        )
    tasks = [
        task
        for split in ("train", "held_out")
        for task in episodes.tasks(split, count=count, seed=SEEDS[0])  # type: ignore[arg-type]
    ]
    began = time.perf_counter()
    rewards, differ = [], []
    for task in tasks:
        first, again = _untouched(episodes, task), _untouched(episodes, task)
        rewards.append(first[1])
        differ += [task.id] * (first != again)
    known = [reward for reward in rewards if reward is not None]
    if tasks:
        found.verify_ms = 1000 * (time.perf_counter() - began) / (2 * len(tasks))
    if known:
        found.scores = min(known), max(known)
    pairs = zip(tasks, rewards, strict=True)
    found.levels = levels([], [(task, reward) for task, reward in pairs if reward is not None])
    if differ:
        _wrong(
            found,
            f"Two episodes of one task begin or are judged differently for {len(differ)} of "
            f"{len(tasks)} tasks, first {differ[0]!r}.",
            "Let reset depend on its arguments alone, and keep an episode's state in its instance.",
        )
    passed = [task.id for task, reward in zip(tasks, rewards, strict=True) if reward == 1]
    if passed:
        _wrong(
            found,
            f"Without a call {len(passed)} of {len(tasks)} tasks pass, first {passed[0]!r}.",
            "Correct get_reward.",
        )
    if len(known) < len(tasks):
        _wrong(
            found,
            f"{len(tasks) - len(known)} of {len(tasks)} tasks get no reward.",
            "get_reward gives None only when the infrastructure failed: see what it needs.",
        )


def _untouched(episodes: Episodes, task: Task) -> tuple[str | None, float | None, str | None]:
    """What an episode says at its start, and how it is judged when nothing was called."""
    episode = episodes.start(task)
    try:
        return episode.opening, episode.reward(), episode.feedback()
    finally:
        episode.close()


def _check_runs(found: Findings, agents: Agents, count: int) -> None:
    tasks = agents.tasks("train", count=count, seed=SEEDS[0])
    tried = try_agents(agents, tasks, ("", GARBAGE))
    found.verify_ms = tried.run_ms
    found.levels = levels([], tried.known)
    if tried.rewards:
        found.scores = min(tried.rewards), max(tried.rewards)
    if passed := sum(reward == 1 for reward in tried.rewards):
        _wrong(
            found,
            f"{passed} of {tried.runs} runs pass with a model that answers nothing of use.",
            "Correct what run returns.",
        )
    if tried.failed:
        _wrong(
            found,
            f"{len(tried.failed)} of {tried.runs} runs fail with a model that answers nothing of "
            f"use, first: {tried.failed[0]}",
            "A run that goes wrong because of the model is worth 0; raise only for what is no "
            "fault of it.",
        )


def _draw(environment: AnyEnvironment, split: Split, count: int, seed: int) -> list[Item]:
    """Tasks without what is sealed: pickles of equal values may differ."""
    if isinstance(environment, TextEnvironment):
        return list(environment.documents(split, count=count, seed=seed))
    return [replace(task, data={}) for task in environment.tasks(split, count=count, seed=seed)]


def _text(item: Item) -> str:
    if isinstance(item, Document):
        return item.text
    return "\n".join(f"{message['role']}: {message['content']}" for message in item.messages)


def _wrong(found: Findings, what: str, next_step: str) -> None:
    found.wrong.append(Wrong(what, next_step))


@dataclass(frozen=True)
class Listed:
    """One environment of EDGE_ENVIRONMENTS; `state` is ready, or why it is not."""

    name: str
    factory: str
    kind: str | None
    anchor: bool
    state: str
    network: str = "open"
    """Nothing keeps an environment from the network but the machine's own rules."""


def list_environment(spec: EnvironmentSpec) -> Listed:
    """Load it in its worker, and say what comes of it."""
    with EnvironmentProcess(spec) as process:
        try:
            kind, state = process.start(), "ready"
        except (SettingsError, EnvironmentFault) as error:
            kind, state = None, str(error)
    return Listed(spec.name, spec.factory, kind, spec.anchor, state)
