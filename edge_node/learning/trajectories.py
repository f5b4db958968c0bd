"""From the turns of an agent's run to the sequences that are trained on. Pure.

In: turns, in token ids, as the node's vLLM had them. Out: sequences with a mask and
log-probabilities. Guarantees: each sampled token is in exactly one sequence, with the context that
it was sampled in, and nothing else is masked in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_node.serving import Turn


@dataclass
class Trajectory:
    """One sequence of a run; `mask` and `logprobs` belong to `completion_ids`, one each.

    mask: 1 for a token that the model sampled, 0 for one that it was told, by a tool or a user.
    logprobs: natural, of sampled tokens at temperature 1, as vLLM says them; 0.0 for others.
    """

    prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def sampled(self) -> int:
        """Tokens that are trained on."""
        return sum(self.mask)

    def continues_as(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt goes on from the end of this sequence."""
        so_far = self.prompt_ids + self.completion_ids
        return list(prompt_ids[: len(so_far)]) == so_far

    def add(self, turn: Turn) -> None:
        """Append a turn for which `continues_as` is true."""
        told = list(turn.prompt_ids[len(self.prompt_ids) + len(self.completion_ids) :])
        self.completion_ids += [*told, *turn.answer_ids]
        self.mask += [0] * len(told) + [1] * len(turn.answer_ids)
        self.logprobs += [0.0] * len(told) + list(turn.logprobs)


def join_turns(turns: Sequence[Turn]) -> list[Trajectory]:
    """A turn whose prompt goes on from a sequence is joined to the longest such; others start one.

    A chat template may write an answer in other tokens than the model sampled, or leave out its
    thoughts. Then the next turn's prompt does not go on from it, and starts a sequence of its own.
    """
    found: list[Trajectory] = []
    for turn in turns:
        fit = [one for one in found if one.continues_as(turn.prompt_ids)]
        if not fit:
            fit = [Trajectory(list(turn.prompt_ids))]
            found += fit
        max(fit, key=lambda one: len(one.completion_ids)).add(turn)
    return found
