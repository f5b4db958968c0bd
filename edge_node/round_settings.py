"""Settings of two parts of a learning round: its local gate, and self-distillation.

In: what `settings.py` read from EDGE_LEARNING__GATE__* and EDGE_LEARNING__SDFT__*. Out: one frozen
group for each. Imports nothing heavy.
"""

from __future__ import annotations

from pydantic import Field

from edge_node.serving_settings import Group


class GateSettings(Group):
    """The local gate, which every round has to pass: EDGE_LEARNING__GATE__*."""

    tasks: int = Field(default=32, ge=0)
    """Held-out tasks (or texts) of each environment that the round's result and its start answer
    before an update is sent. 0: nothing is asked, and rounds are sent unjudged.
    """
    attempts: int = Field(default=4, ge=1, le=64)
    """Besides a greedy answer, sampled answers to each task, which must all pass (pass^k). A task's
    attempts end with its first failure. 1: the greedy answer alone.
    """
    temperature: float = Field(default=0.7, gt=0, le=2)
    """Of the sampled answers."""
    tolerance_points: float = Field(default=5, ge=0)
    """An environment may fall by this many points; further, and not by chance, stops the round."""
    tolerance_nats: float = Field(default=0.1, ge=0)
    """The same for an environment of texts: mean log-probability, nats a token."""


class SdftSettings(Group):
    """Sft rounds by self-distillation: EDGE_LEARNING__SDFT__*. Experimental."""

    enabled: bool = False
    """Learn from corrected and verified answers by self-distillation instead of cross-entropy: the
    release is shown the right answer in its prompt, and the model learns to answer as it does then.
    A tiny model cannot use this; a round says so. Dense self-distillation is reported to collapse.
    """
    max_answer_tokens: int = Field(default=128, ge=1)
    """Longest answer that the model samples while it learns. The learner samples it, not vLLM."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak rate of the first round; linear decay inside a round."""
