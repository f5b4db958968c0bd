from __future__ import annotations

import pytest
import torch

from edge_node.learning.parts import cut


def make_batch(*lengths: int) -> dict[str, torch.Tensor]:
    """Row i holds the number 10 * i + place, with zeros behind."""
    width = max(lengths)
    mask = torch.tensor([[int(place < n) for place in range(width)] for n in lengths])
    numbers = 10 * torch.arange(len(lengths))[:, None] + torch.arange(width)
    return {"input_ids": numbers * mask, "attention_mask": mask, "kind": torch.arange(len(lengths))}


@pytest.mark.parametrize("budget", [1, 3, 6, 7, 12, 1000])
def test_parts_hold_every_row_once_within_the_budget(budget: int) -> None:
    lengths = (3, 5, 1, 3, 2, 5, 3)
    parts = cut(make_batch(*lengths), budget)
    assert sorted(row for part in parts for row in part["kind"].tolist()) == list(range(7))
    for part in parts:
        rows, width = part["input_ids"].shape
        assert rows * width <= budget or rows == 1
        assert part["attention_mask"].shape == (rows, width)
        assert part["attention_mask"].sum(dim=1).max() == width, "no part is wider than its rows"
        for kind, ids in zip(part["kind"].tolist(), part["input_ids"].tolist(), strict=True):
            assert ids[: lengths[kind]] == [10 * kind + place for place in range(lengths[kind])]


def test_rows_of_like_length_are_together() -> None:
    parts = cut(make_batch(9, 1, 9, 1), 18)
    assert [part["kind"].tolist() for part in parts] == [[1, 3], [0, 2]]


def test_a_budget_that_holds_everything_leaves_one_part() -> None:
    (part,) = cut(make_batch(2, 4), 8)
    assert part["input_ids"].shape == (2, 4)
