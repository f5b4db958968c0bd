"""Answers under way that will be kept: feedback on them may come before they are stored.

In: the first piece of a stream, and its end. Out: whether an id is one of them. Only a stream tells
its id before its answer is stored: the last bytes of every answer wait for that. One event loop
writes; other threads may ask.
"""

from __future__ import annotations

import re

ID = re.compile(rb'"id": ?"([\x21\x23-\x7e]{1,200})"')
"""The first id in the first event of a stream is the answer's."""


class InFlight:
    """Of one serving process."""

    def __init__(self) -> None:
        self._ids: dict[object, tuple[str, str | None]] = {}

    def begin(self, request: object, first_piece: bytes, user: str | None) -> None:
        """`request` answers `user` with a stream that begins with these bytes."""
        if (found := ID.search(first_piece)) is not None:
            self._ids[request] = (found[1].decode(), user)

    def end(self, request: object) -> None:
        """Its answer is stored, or will not be."""
        self._ids.pop(request, None)

    def among(self, ids: list[str], user: str | None) -> frozenset[str]:
        """Those of `ids` that are under way; with a user: that answer this user."""
        known = {one for one, asked_by in self._ids.copy().values() if user in (None, asked_by)}
        return frozenset(known.intersection(ids))
