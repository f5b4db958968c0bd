"""A step's batch in parts that fit into memory (importing this module loads torch).

In: a padded batch and a budget of tokens. Out: its rows in parts, each of rows of like length.
Guarantees: every row is in one part; the same batch gives the same parts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def cut(batch: Mapping[str, torch.Tensor], most_tokens: int) -> list[dict[str, torch.Tensor]]:
    """Parts of at most `most_tokens` tokens, padding included; a longer row is alone in its part.

    Args:
        batch: `attention_mask` int [rows, length], padded on the right; other tensors are
            [rows, length, ...] and cut to a part's longest row, or [rows, ...].

    A step's gradient is the sum of its parts' gradients if each loss is a sum over the part's
    tokens divided by a number of the whole step. So a loss of several means (own rows, anchor rows)
    divides each of its sums by its own count over the step, never over the part.
    """
    mask = batch["attention_mask"]
    lengths = mask.sum(dim=1).tolist()
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if parts and lengths[row] * (len(parts[-1]) + 1) <= most_tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    return [
        {
            name: _rows(values, rows, mask.shape[1], lengths[rows[-1]])
            for name, values in batch.items()
        }
        for rows in parts
    ]


def _rows(values: torch.Tensor, rows: list[int], width: int, longest: int) -> torch.Tensor:
    chosen = values[rows]
    return chosen[:, :longest] if chosen.dim() > 1 and chosen.shape[1] == width else chosen
