"""vLLM as a grpo round sees it, in this process: samples from the policy that was published.

In: a start release, published increments. Out: answers and log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edge_node.learning.policies import side_by_side
from edge_node.learning.rollouts import Answer, Ask
from protos.lora import LoraTensors
from tests.fakes.tiny_sampler import TinySampler


class PolicyRollouts:
    """Satisfies rollouts.Rollouts; `publish` is what train_grpo calls."""

    def __init__(
        self,
        samples: int,
        max_tokens: int = 2,
        release: LoraTensors | None = None,
        fails: Callable[[str, Ask], bool] = lambda model, ask: False,
    ) -> None:
        self._samples = samples
        self._max_tokens = max_tokens
        self._release = release or LoraTensors()
        self._fails = fails
        self._sampler = TinySampler()
        self.published: list[int] = []
        self.asked: list[tuple[str, Ask]] = []

    def publish(self, step: int, increment: LoraTensors) -> str:
        self._sampler.use(side_by_side(self._release, increment))
        self.published.append(step)
        return f"policy/test@{step}"

    async def sample(self, model: str, asks: Sequence[Ask]) -> list[list[Answer] | None]:
        self.asked += [(model, ask) for ask in asks]
        return [None if self._fails(model, ask) else self._answers(ask) for ask in asks]

    def _answers(self, ask: Ask) -> list[Answer]:
        return self._sampler.answers(
            ask.prompt_ids, samples=self._samples, seed=ask.seed, max_tokens=self._max_tokens,
            greedy=False,
        )  # fmt: skip
