"""Which adapter every request gets: the alias, the loaded versions, and what is in flight on each.

In: load, point, retire; arrivals and departures of requests. Out: the exact name for each request,
fixed at arrival. Guarantees: pointing is one assignment; a version with requests in flight never
goes away. One event loop only.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from edge_node.errors import ServingError

PRIVATE = "policy/"
"""Beginning of the names of the learner's own versions. No alias can begin so: it has no slash."""


class AliasTable:
    """Names of one serving process. Not thread-safe: only the server's event loop calls it."""

    def __init__(self, alias: str, base: str) -> None:
        self.alias = alias
        self.base = base
        self.target: str | None = None
        self.canary: str | None = None
        """What a share of the alias's requests means (versions.py); None: there is no canary."""
        self.own: str | None = None
        """The node's own adapter, which is built on the target; None: there is none."""
        self.in_flight: Counter[str] = Counter()
        self._loaded: dict[str, Path] = {}
        self._retiring: set[str] = set()
        self._unproved: set[str] = set()
        self._left = asyncio.Event()

    @property
    def loaded(self) -> dict[str, Path]:
        """Versions that requests may name, with their directories."""
        return {name: path for name, path in self._loaded.items() if name not in self._retiring}

    @property
    def public(self) -> list[str]:
        """Names of the versions that clients may know."""
        return [name for name in self.loaded if not self.hidden(name)]

    def resolve(self, model: str | None) -> str | None:
        """Exact name for a request. No model means the alias; None: it points nowhere yet."""
        return self.target if model is None or model in ("", self.alias) else model

    def hidden(self, name: str) -> bool:
        """Clients may not name it: it is the learner's, or was not proved yet."""
        return name.startswith(PRIVATE) or name in self._unproved

    def retiring(self, name: str) -> bool:
        return name in self._retiring

    def enter(self, name: str) -> None:
        self.in_flight[name] += 1

    def leave(self, name: str) -> None:
        self.in_flight[name] -= 1
        if not self.in_flight[name]:
            del self.in_flight[name]
        self._left.set()

    async def idle(self, name: str | None = None) -> None:
        """Returns when nothing is in flight on `name` (None: on anything)."""
        while self.in_flight if name is None else self.in_flight[name]:
            self._left.clear()
            await self._left.wait()

    def check_new(self, name: str, path: Path) -> bool:
        """True: `name` must be loaded. False: it is loaded already. Raises ServingError."""
        alias, separator, label = name.partition("@")
        private = alias.startswith(PRIVATE)
        if not (private or alias == self.alias) or not separator or not label:
            raise ServingError(
                f"Version name {name!r} is not usable; expected {self.alias}@<label>, or "
                f"{PRIVATE}<round>@<step> of the learner."
            )
        if name in self._retiring:
            raise ServingError(
                f"{name} is being unloaded. Wait for that to end, then load it again."
            )
        if name in self._loaded and self._loaded[name] != path:
            raise ServingError(
                f"{name} is loaded from {self._loaded[name]}, not from {path}. A version is never "
                "replaced in place: give the other bytes another name."
            )
        return name not in self._loaded

    def add(self, name: str, path: Path, *, proved: bool = True) -> None:
        """`proved`: False hides it until `show`."""
        self._loaded[name] = path
        if not proved:
            self._unproved.add(name)

    def show(self, name: str) -> None:
        """It was proved: clients may name it, and the alias may point at it."""
        self._unproved.discard(name)

    def point(self, name: str) -> None:
        if name not in self.public:
            raise ServingError(
                f"{name} is not loaded, so {self.alias} cannot point at it. Loaded: "
                f"{self._names()}."
            )
        if name != self.target:
            self.own = None  # it is better than the version that was the target
        self.target = name

    def point_own(self, name: str | None) -> None:
        """None: there is no own adapter any more."""
        if name is not None and name not in self.public:
            raise ServingError(
                f"{name} is not loaded, so it cannot be the node's own adapter. Loaded: "
                f"{self._names()}."
            )
        self.own = name

    def point_canary(self, name: str | None) -> None:
        """None: from now on all requests for the alias get its target."""
        if name is not None and name not in self.public:
            raise ServingError(
                f"{name} is not loaded, so it cannot be the canary. Loaded: {self._names()}."
            )
        self.canary = name

    def knows(self, name: str) -> bool:
        """Is it the base, or a loaded version?"""
        return name == self.base or name in self._loaded

    def retire(self, name: str) -> bool:
        """Refuses new requests for `name`; False when it is not loaded.

        Raises ServingError for the alias's target and the canary, and while an earlier retirement
        waits: who is told that a version is gone deletes its directory.
        """
        if name in self._retiring:
            raise ServingError(
                f"{name} is being unloaded already, and {self.in_flight[name]} requests are still "
                "on it."
            )
        if name == self.target:
            raise ServingError(
                f"{self.alias} points at {name}. Point it at another version before unloading "
                "this one."
            )
        if name in (self.canary, self.own):
            what = "the canary" if name == self.canary else "the node's own adapter"
            raise ServingError(f"{name} is {what}. Name another one, or none, before unloading it.")
        if name not in self._loaded:
            return False
        self._retiring.add(name)
        return True

    def remove(self, name: str) -> None:
        self._retiring.discard(name)
        self._unproved.discard(name)
        self._loaded.pop(name, None)

    def reinstate(self, name: str) -> None:
        """Takes back a retirement that could not be finished."""
        self._retiring.discard(name)

    def _names(self) -> str:
        return ", ".join(self.public) or "none"
