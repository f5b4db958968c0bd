"""The smallest environment of texts: plain words in an order that the seed chooses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from edge_node.environments import Document


class Texts:
    """`number` held-out documents of `words` words each, `w0` to `w239`."""

    def __init__(self, number: int = 24, words: int = 12) -> None:
        self._number = number
        self._words = words

    def documents(
        self, split: Literal["train", "held_out"], *, count: int, seed: int
    ) -> Sequence[Document]:
        numbers = random.Random(seed).sample(range(self._number), self._number)[:count]
        return [Document(f"{split}/{number}", self._text(split, number)) for number in numbers]

    def _text(self, split: str, number: int) -> str:
        rng = random.Random(f"{split}/{number}")
        return " ".join(f"w{rng.randrange(240)}" for _ in range(self._words))
