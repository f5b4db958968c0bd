"""One episode of an environment with tools: the model calls, the tools answer, until it is done.

In: episodes of an environment, a task, a chat template, and how the model is sampled. Out: a
Trajectory in token ids, with its reward. Guarantees: what the model sampled is never tokenized
again, and `sampled` says which tokens those are; the same model, task and seeds give the same
trajectory where the tools do. Training, the local gate and the evaluation for central all use it,
so that what is learnt is what is measured.

Tool calls have the Hermes format, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, read
as vLLM's `--tool-call-parser hermes` reads them for clients.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from edge_node.base_model import longest_context
from edge_node.environments import Episode, Episodes, Task, in_own_thread
from edge_node.releases.asking import ask
from edge_node.rendering import ChatFormat, Renderer, load_renderer
from edge_node.settings import EdgeSettings

PASSES = 1 - 1e-9
"""Reward from which an episode passes."""
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", re.DOTALL)


@dataclass(frozen=True)
class Turn:
    """token_ids: what the model sampled. logprobs: of each, natural. ended: by the model itself."""

    token_ids: list[int]
    logprobs: list[float]
    ended: bool


Sample = Callable[[Sequence[int], int, int], Awaitable[Turn]]
"""(ids so far, most tokens, number of the turn) -> the next turn; raises ServingError."""


@dataclass(frozen=True)
class Rules:
    """What bounds an episode. context: most tokens of all turns and results together."""

    renderer: Renderer
    turns: int
    answer_tokens: int | None
    context: int

    def room(self, used: int) -> int:
        """Most tokens of the next turn after `used` ones."""
        left = self.context - used
        return left if self.answer_tokens is None else min(left, self.answer_tokens)


def read_rules(settings: EdgeSettings, base: Path, answer_tokens: int | None) -> Rules:
    """Those of this node's vLLM, as it said at its start; loads transformers.

    Raises StorageError when what it said cannot be read.
    """
    renderer = load_renderer(base, ChatFormat.read(settings.data_dir))
    turns = settings.learning.grpo.max_turns
    return Rules(renderer, turns, answer_tokens, longest_context(settings, base))


@dataclass
class Trajectory:
    """prompt_ids: up to the first turn. The lists after it have one entry for each later token."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """0 where the token was not sampled."""
    sampled: list[bool] = field(default_factory=list)
    """False: a tool's result, or what the template writes around it."""
    turns: int = 0
    reward: float | None = None
    """None: the infrastructure of the environment failed."""

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.token_ids

    @property
    def passed(self) -> bool:
        return self.reward is not None and self.reward >= PASSES

    def say(self, turn: Turn) -> None:
        """The model's next turn."""
        self.token_ids += turn.token_ids
        self.logprobs += turn.logprobs
        self.sampled += [True] * len(turn.token_ids)
        self.turns += 1

    def tell(self, ids: Sequence[int]) -> None:
        """What the model is told before its next turn."""
        self.token_ids += ids
        self.logprobs += [0.0] * len(ids)
        self.sampled += [False] * len(ids)


async def run_episode(rules: Rules, episodes: Episodes, task: Task, sample: Sample) -> Trajectory:
    """Until the model calls no tool, its turns are over, or no room is left; then it is judged.

    The calls of its last turn are run too. A turn that was cut has no calls.

    Raises:
        ServingError: vLLM did not answer.
        EnvironmentFault: the environment raised outside a tool, hung or crashed.
    """
    episode = await in_own_thread(episodes.start, task)
    try:
        messages = _opened(task.messages, episode.opening)
        way = Trajectory(rules.renderer.prompt_ids(messages, episodes.schemas))
        while way.turns < rules.turns and (room := rules.room(len(way.ids))) > 0:
            turn = await sample(way.ids, room, way.turns)
            way.say(turn)
            calls = read_calls(rules.renderer.answer_text(turn.token_ids)) if turn.ended else []
            if not calls:
                break
            results = await _run(episode, calls, way.turns)
            if way.turns == rules.turns:
                break
            told = rules.renderer.after_calls_ids(messages, results, episodes.schemas)
            if rules.room(len(way.ids) + len(told)) < 1:
                break
            way.tell(told)
        way.reward = await in_own_thread(episode.reward)
        return way
    finally:
        await in_own_thread(episode.close)


async def _run(episode: Episode, calls: Sequence[Call], turn: int) -> list[dict[str, str]]:
    """Messages of role `tool`, one for each call, in order."""
    results = []
    for number, call in enumerate(calls):
        if isinstance(call.arguments, Mapping):
            text = await in_own_thread(episode.call, call.name, call.arguments)
        else:
            kind = type(call.arguments).__name__
            text = f"TypeError: arguments are a {kind}; expected a JSON object"
        known = {"role": "tool", "name": call.name, "tool_call_id": f"call-{turn}-{number}"}
        results.append(known | {"content": text})
    return results


def _opened(messages: Sequence[Mapping[str, str]], opening: str | None) -> list[dict[str, str]]:
    """The messages with `opening` at the end of the first one of the user."""
    opened = [dict(message) for message in messages]
    if opening:
        first = next((one for one in opened if one["role"] == "user"), None)
        if first is None:
            return [*opened, {"role": "user", "content": opening}]
        first["content"] += opening
    return opened


@dataclass(frozen=True)
class Call:
    """A tool call as the model wrote it; `arguments` may be any JSON value."""

    name: str
    arguments: Any


def read_calls(text: str) -> list[Call]:
    """The tool calls in an answer; none when one of them cannot be read, as vLLM does it."""
    try:
        found = [json.loads(whole or open_end) for whole, open_end in _CALL.findall(text)]
        calls = [Call(call["name"], call["arguments"]) for call in found]
    except (ValueError, TypeError, LookupError, RecursionError):
        return []
    return calls if all(isinstance(call.name, str) for call in calls) else []


def sampler(
    client: httpx.AsyncClient, model: str, *, temperature: float, seed: str, what: str
) -> Sample:
    """Samples the served version `model` over the control socket, captured by nobody.

    seed: text that each turn's seed is made of. what: the task, for errors.
    """

    async def sample(ids: Sequence[int], most: int, turn: int) -> Turn:
        body = {
            "model": model,
            "prompt": list(ids),
            "n": 1,
            "max_tokens": most,
            "temperature": temperature,
            "seed": int.from_bytes(hashlib.sha256(f"{seed}/{turn}".encode()).digest()[:4], "big"),
            "logprobs": 0,
            "return_token_ids": True,
        }
        (choice,) = (await ask(client, "/v1/completions", body, what))["choices"]
        return Turn(
            choice["token_ids"],
            choice["logprobs"]["token_logprobs"],
            choice["finish_reason"] == "stop",
        )

    return sample
