"""Errands at a warehouse: look up what a customer has, then act on it.

In: a split, a count, a seed. Out: tasks whose answer is two tool calls. The look-up gives two
numbers, the item's and its shelf's. Only an act on the item, with the verb of the request, is
right. Guarantees: standard library only, apart from the contract; the same arguments give the same
tasks; a hash of the text decides the split.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from edge_node.environments import Split, Task

OWNERS = (
    *("ana", "ben", "cleo", "dora", "emil", "finn", "gina", "hugo", "ivan", "jana"),
    *("karl", "lena", "mara", "nils", "olga", "paul", "rosa", "sven", "tina", "vera"),
)
VERBS = ("ship", "hold", "move", "lock", "count", "clean", "check", "print")
NOUNS = ("crate", "box", "bag", "case", "drum", "pack")
TEMPLATES = (
    "{verb} the {noun} of {owner}",
    "please {verb} the {noun} of {owner}",
    "{owner} wants us to {verb} a {noun}",
    "for {owner}: {verb} the {noun}",
)
HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class Errand:
    """item, shelf: two digits each, and none of them in both."""

    owner: str
    verb: str
    text: str
    item: str
    shelf: str

    @property
    def found(self) -> dict[str, str]:
        """What the look-up gives."""
        return {"item": self.item, "shelf": self.shelf}


class Errands:
    """One episode is one errand."""

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        """At most `count` tasks with distinct texts; both splits have 3,840."""
        found: list[Task] = []
        for errand in errands(random.Random(f"errands/{split}/{seed}"), split):
            if len(found) == count:
                break
            digest = hashlib.sha256(errand.text.encode()).hexdigest()
            message = {"role": "user", "content": errand.text}
            data = {"owner": errand.owner, "verb": errand.verb, "has": errand.found}
            found.append(Task(f"errand-{digest[:12]}", [message], data))
        return found

    def reset(self, owner: str, verb: str, has: Mapping[str, str]) -> None:
        """The customer `owner`, who `has` an item on a shelf, asks for `verb`."""
        self._owner, self._verb, self._has = owner, verb, dict(has)
        self._acts: list[tuple[str, str]] = []

    def look_up(self, owner: str) -> dict[str, str]:
        """Find what a customer has here.

        Args:
            owner: Name of the customer.
        """
        if owner != self._owner:
            raise LookupError(f"{owner} has nothing here")
        return self._has

    def act(self, verb: str, ref: str) -> str:
        """Do something with an item.

        Args:
            verb: What is done.
            ref: Number of the item.
        """
        self._acts.append((ref, verb))
        return "done"

    def get_reward(self) -> float:
        """1 for one act, on the right item, with the right verb."""
        return float(self._acts == [(self._has["item"], self._verb)])


def errands(draw: random.Random, split: Split) -> Iterator[Errand]:
    """Those of one split in a random order, no text twice."""
    every = [
        (owner, verb, template.format(owner=owner, verb=verb, noun=noun))
        for owner in OWNERS
        for verb in VERBS
        for noun in NOUNS
        for template in TEMPLATES
    ]
    for owner, verb, text in draw.sample(every, len(every)):
        digits = draw.sample("0123456789", 4)
        if split_of(text) == split:
            yield Errand(owner, verb, text, "".join(digits[:2]), "".join(digits[2:]))


def split_of(text: str) -> Split:
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
    return "held_out" if value < HELD_OUT_SHARE else "train"
