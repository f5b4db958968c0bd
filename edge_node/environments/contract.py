"""What an environment plug-in provides. Any object with the methods of one kind will do.

An Environment has tasks and judges answers. A ToolEnvironment has tasks and tools: the model calls
them in several turns, and what it has done is judged. An AgentEnvironment has tasks and an agent of
its own, which asks the node's endpoint as any client would. A TextEnvironment has texts, whose
likelihood is measured.

In: a split, a count and a seed; an answer to a task, or calls of tools. Out: tasks or documents;
outcomes or rewards. Guarantees: the same arguments give the same tasks or documents. `train` and
`held_out` never share a text. `verify` never raises for an answer, however broken it is; the
outcome's `reason` says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from edge_node.errors import EnvironmentFault

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Task:
    """A request as a client would send it.

    `data` is what the verifier needs and no client sees. Of a ToolEnvironment it is the keyword
    arguments of `reset`. A plug-in's task may leave out what has a default here.
    """

    id: str
    messages: list[dict[str, str]]
    data: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    """How often it is drawn for training, against the others of its environment; above 0."""
    difficulty: int | None = None
    """A level for people, who see the rewards of each one apart; 0 is the easiest."""


@dataclass(frozen=True)
class Outcome:
    """Verdict on one answer. score: 0..1. correction: a right answer, where one is known."""

    passed: bool
    score: float
    reason: str
    correction: str | None


@dataclass(frozen=True)
class Document:
    """A text whose tokens' log-probabilities are measured; `id` is the same on every machine."""

    id: str
    text: str


@runtime_checkable
class Environment(Protocol):
    """Work at a customer."""

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        """`count` distinct tasks, or as many as there are; the same ones for the same arguments.

        The tasks of a larger count begin with those of a smaller one. A candidate that is undecided
        is asked the ones after them.
        """

    def verify(self, task: Task, answer: str) -> Outcome:
        """Judge `answer`; never raises for a bad one."""

    def reference_answer(self, task: Task) -> str | None:
        """A right answer, where one is known; anchors need it."""


@runtime_checkable
class TextEnvironment(Protocol):
    """Texts that a release must not find less likely. They are only measured, never learnt from."""

    def documents(self, split: Split, *, count: int, seed: int) -> Sequence[Document]:
        """`count` distinct documents, or as many as there are; the same for the same arguments.

        Those of a larger count begin with those of a smaller one. Each has two tokens or more.
        """


@runtime_checkable
class ToolEnvironment(Protocol):
    """Work in several turns, as a plug-in writes it: the model calls tools until it is done.

    Each episode has an instance of its own, made by the factory with the options. Every other
    public method is a tool. It has type hints and a docstring in Google style, with a line for each
    argument under `Args:`. Its result is told to the model: a text as it is, another value as JSON.
    What it raises is told to the model too, as the name and the message of the exception.

    Optional methods, which are no tools:

    - `feedback() -> str | None`: what to do better, in words, after the last turn.
    - `close()`: the episode is over; give back what it holds.
    - `tools()` and `call_tool(name, arguments)`: for tools that are known only at run time. Then no
      method is a tool. `tools` gives their JSON schemas as the OpenAI API has them, the same ones
      for each instance: `{"type": "function", "function": {"name": ..., "description": ...,
      "parameters": ...}}`. `call_tool` runs one, as a method would.
    """

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        """As those of an Environment; the instance that is asked has no episode."""

    def reset(self, **data: Any) -> str | None:
        """Start the episode of a task, with its `data`, once.

        A text is appended to the task's first user message.
        """

    def get_reward(self) -> float | None:
        """0 to 1, after the last turn; 1 passes.

        None: the infrastructure failed, and nobody knows. Then nothing is learnt from the episode.
        """


class AgentEnvironment(Protocol):
    """A whole agent, as a plug-in writes it: it does a task by itself, with the node's model."""

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        """As those of an Environment."""

    async def run(self, task: Task, base_url: str, api_key: str, model: str) -> float | None:
        """Do `task` with the OpenAI-compatible endpoint `base_url`, and say how well it went.

        Several runs go on at once in one event loop, so none may block it. `api_key` is a secret
        of this run alone, by which the node knows its requests. The node decides how answers are
        sampled (temperature, top_p, penalties, seed) and how long they may be, and answers one
        choice a request.

        Returns 0 to 1; 1 passes. None: the infrastructure failed, and nobody knows. What it raises
        costs this run. A run that takes longer than `run_timeout_s` is cancelled.
        """


PlugIn = Environment | ToolEnvironment | AgentEnvironment | TextEnvironment
"""What a factory makes."""


class Episode(Protocol):
    """One episode of a ToolEnvironment, as the node sees it. Calls raise EnvironmentFault."""

    @property
    def opening(self) -> str | None:
        """What `reset` gave."""

    def call(self, tool: str, arguments: Mapping[str, Any]) -> str:
        """What the model is told of this call, also where it went wrong; raises for no call."""

    def reward(self) -> float | None:
        """0 to 1; None: the infrastructure failed."""

    def feedback(self) -> str | None:
        """What to do better, where the environment says it."""

    def close(self) -> None:
        """The episode is over; idempotent."""


@runtime_checkable
class Episodes(Protocol):
    """A ToolEnvironment as the node sees it; its instances are in the worker."""

    @property
    def schemas(self) -> Sequence[dict[str, Any]]:
        """JSON schemas of the tools, for a chat template."""

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        """As those of an Environment."""

    def start(self, task: Task) -> Episode:
        """A new episode of `task`; whoever starts it closes it."""


@dataclass(frozen=True)
class AgentRun:
    """What the `run` of an AgentEnvironment is given."""

    task: Task
    base_url: str
    api_key: str
    model: str


@runtime_checkable
class Agents(Protocol):
    """An AgentEnvironment as the node sees it."""

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        """As those of an Environment."""

    def run_all(self, runs: Sequence[AgentRun]) -> list[float | EnvironmentFault | None]:
        """The rewards of runs that go on at once, in their order; the fault of one that failed.

        Raises EnvironmentFault when the agent blocked or crashed its process.
        """


AnyEnvironment = Environment | Episodes | Agents | TextEnvironment
"""What the node asks."""
