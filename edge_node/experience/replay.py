"""Which earlier examples a round replays.

In: the usable examples by the release that answered, a seed. Out: names of those that are drawn.
An interaction does not say which environment it belongs to, so the release stands for the time, and
each time has the same share: what was frequent lately does not crowd out what was rare or long ago.
Of each release it is a uniform sample without replacement, as a reservoir holds (Vitter 1985,
"Random sampling with a reservoir"). It is drawn anew in each round from what the node still holds
(retention.py), so nothing has to be kept beside the experience, and what was deleted cannot come
back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TypeVar

Name = TypeVar("Name", int, str)


def draw(examples: Iterable[tuple[Name, str]], *, count: int, seed: int) -> list[Name]:
    """At most `count` names of `examples` (name, release), in equal parts of each release.

    A release with few examples gives all, and the others share what it leaves. The same arguments
    give the same names, in the same order, whatever the order of `examples`.
    """
    by_release: dict[str, list[tuple[str, Name]]] = {}
    for name, release in examples:
        order = hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()
        by_release.setdefault(release, []).append((order, name))
    turns = sorted(
        (turn, order, name)
        for drawn in by_release.values()
        for turn, (order, name) in enumerate(sorted(drawn))
    )
    return [name for _, _, name in turns[:count]]
