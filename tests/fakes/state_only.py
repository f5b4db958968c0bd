"""A journal without a database: events are applied, and kept in a list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

from central.journal import Event, NewEvent, State
from central.journal.events import chain
from tests.unit.central import builders as make


class StateOnly:
    """What readers of a Journal use."""

    def __init__(self) -> None:
        self.state = State()
        self.at = make.AT
        self.recorded: list[Event] = []
        self._listeners: list[Callable[[Event], None]] = []

    @contextmanager
    def read(self) -> Iterator[State]:
        yield self.state

    def clock(self) -> str:
        return self.at

    def now(self) -> datetime:
        return datetime.fromisoformat(self.at)

    def append(self, *news: NewEvent) -> None:
        for new in news:
            state = self.state
            event = chain(new, state.sequence + 1, self.at, state.last_hash)
            state.apply(event)
            state.mark()
            self.recorded.append(event)
            for listener in self._listeners:
                listener(event)

    def events(self, after: int = 0, limit: int = 1000) -> list[Event]:
        return self.recorded[after : after + limit]

    def add_listener(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback)
