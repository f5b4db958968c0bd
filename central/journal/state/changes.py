"""Changes of dictionaries, lists and attributes that can be taken back.

In: one change at a time. Out: nothing; `undo` restores what was there at the last `forget`.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Changes:
    """Makes changes and remembers how to take them back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def put(self, records: MutableMapping[K, V], key: K, value: V) -> None:
        """`records[key] = value`."""
        if key in records:
            old = records[key]
            self._undo.append(lambda: records.__setitem__(key, old))
        else:
            self._undo.append(lambda: records.__delitem__(key))
        records[key] = value

    def drop(self, records: MutableMapping[K, V], key: K) -> None:
        """`del records[key]`."""
        old = records.pop(key)
        self._undo.append(lambda: records.__setitem__(key, old))

    def append(self, records: MutableMapping[K, list[V]], key: K, value: V) -> None:
        """`records[key].append(value)`, a new list if need be.

        What grows for ever is not copied for every addition.
        """
        if key not in records:
            self.put(records, key, [value])
        else:
            records[key].append(value)
            self._undo.append(lambda: records[key].__delitem__(-1))

    def replace(self, records: list[V], index: int, value: V) -> None:
        """`records[index] = value`."""
        old = records[index]
        self._undo.append(lambda: records.__setitem__(index, old))
        records[index] = value

    def assign(self, owner: object, name: str, value: Any) -> None:
        """`owner.name = value`."""
        old = getattr(owner, name)
        self._undo.append(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    def list_in(
        self, index: MutableMapping[K, tuple[str, ...]], key: K, item: str, wanted: bool
    ) -> int:
        """Let `index[key]` have the item or not.

        Returns 1 when the item came, -1 when it went, 0 when nothing changed. The index holds a
        tuple, because after an undo the item must come back in its place.
        """
        listed = index.get(key, ())
        if wanted == (item in listed):
            return 0
        left = tuple(other for other in listed if other != item)
        self.put(index, key, (*listed, item) if wanted else left)
        return 1 if wanted else -1

    def count(self, numbers: MutableMapping[K, int], key: K, moved: int) -> None:
        """`numbers[key] += moved`, from 0."""
        self.put(numbers, key, numbers.get(key, 0) + moved)

    def forget(self) -> None:
        """Forget how to take back what was done so far."""
        self._undo.clear()

    def undo(self) -> None:
        """Take back everything since `forget`, the last change first."""
        while self._undo:
            self._undo.pop()()
