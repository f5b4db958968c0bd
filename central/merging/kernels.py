"""Which kernel truncates a sum of low-rank terms: one rule.

In: the summed rank of one module, the rank of the result, and whether the terms come one at a time. Out: the kernel.

| kernel     | when                                            | memory            | error over the optimum (measured)     |
|------------|-------------------------------------------------|-------------------|---------------------------------------|
| EXACT      | summed rank <= max(512, 8R)                     | the terms         | none                                  |
| FOLD       | above it, terms come one at a time (the default) | max(512, 8R) rank | <= 1.3 %                              |
| RANDOMIZED | above it, all terms are in memory anyway        | the terms         | <= 0.6 %                              |

The fold is the default above the limit because central streams updates from disk: its memory does not grow with their
number. The range finder is for rules that hold every update by nature (RegMean), where a fold would gain no memory, and for
removals, which a fold that has cut the tail of what is removed cannot undo.
"""

from __future__ import annotations

from enum import StrEnum

EXACT_RANK = 512
"""Largest summed rank of one module that is combined in one exact step."""
STATE_FACTOR = 4
"""Rank of the folding state over the rank of the result."""


class Kernel(StrEnum):
    EXACT = "exact"
    FOLD = "fold"
    RANDOMIZED = "randomized"


def choose_kernel(summed_rank: int, rank: int, *, streamed: bool, exact_rank: int = EXACT_RANK) -> Kernel:
    """The kernel for terms of `summed_rank` that are cut to `rank`; `exact_rank` moves the limit."""
    # A state of rank 4R must take in at least as much as it keeps, or folding would mostly fold itself.
    if summed_rank <= max(exact_rank, 2 * STATE_FACTOR * rank):
        return Kernel.EXACT
    return Kernel.FOLD if streamed else Kernel.RANDOMIZED
