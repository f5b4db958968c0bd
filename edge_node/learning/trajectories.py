"""From the turns of an agent's run to the sequence that is trained on. Pure.

In: turns, in token ids, as the node's vLLM had them. Out: sequences that say which tokens were
sampled, with their log-probabilities. Guarantees: each sampled token is in exactly one sequence,
with the context that it was sampled in, and nothing else counts as sampled.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from edge_node import episodes
from edge_node.agent_runs import RunEnd
from edge_node.episodes import Trajectory
from edge_node.serving import Turn


def join_turns(turns: Sequence[Turn]) -> list[Trajectory]:
    """A turn whose prompt goes on from a sequence is joined to the longest such; others start one.

    A chat template may write an answer in other tokens than the model sampled, or leave out its
    thoughts. Then the next turn's prompt does not go on from it, and starts a sequence of its own.
    """
    found: list[Trajectory] = []
    for turn in turns:
        fit = [one for one in found if list(turn.prompt_ids[: len(one.ids)]) == one.ids]
        if not fit:
            fit = [Trajectory(list(turn.prompt_ids))]
            found += fit
        way = max(fit, key=lambda one: len(one.token_ids))
        way.tell(turn.prompt_ids[len(way.ids) :])
        way.say(episodes.Turn(list(turn.answer_ids), list(turn.logprobs), ended=True))
    return found


def drawn(end: RunEnd, seed: int) -> Trajectory | None:
    """The sequence of a run that a round learns from, with the run's reward.

    A round has one sequence for each sample. Where a run has several, `seed` draws one, each as
    likely as it has sampled tokens: so each sampled token is learnt from equally often.

    None: there is nothing to learn. No reward is known, the model was asked nothing, or it was
    shown more than text.
    """
    if end.reward is None or not all(turn.text_only for turn in end.turns):
        return None
    found = join_turns(end.turns)
    weights = [sum(one.sampled) for one in found]
    if not any(weights):
        return None
    (way,) = random.Random(seed).choices(found, weights)
    way.reward = end.reward
    return way
