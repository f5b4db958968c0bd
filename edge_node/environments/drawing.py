"""Which tasks are trained on, and how often.

In: train tasks with their weights. Out: those of a round, in training order. Guarantees: the same
arguments give the same draw; where all weights are equal, the tasks stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def by_weight(items: Sequence[T], weights: Sequence[float], count: int, seed: int) -> Sequence[T]:
    """`count` of `items`, each as likely as its weight, again and again; all of them as they are
    when no weight differs.
    """
    if len(set(weights)) <= 1:
        return items
    return random.Random(f"weights/{seed}").choices(items, weights, k=count)
