"""Group commit: updates that are ready at the same time share one journal transaction, and so one fsync.

In: for each update, a function that says which events admit it, and one that answers its node. Out: a future with that
answer, set when the events are durable. Guarantees: an error reaches only the update that it concerns; updates are admitted in the order in which they
came.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from central.errors import CentralError
from central.journal import Journal, NewEvent, State, UpdateRecord

Make = Callable[[State], Sequence[NewEvent]]
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One update that is to be admitted."""

    node_id: str
    update_id: str
    make: Make
    answer: Callable[[UpdateRecord], Any]
    done: Future[Any]


class GroupCommit:
    """One per journal; thread-safe. Its one thread commits all that wait, and while it does so the next ones gather."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._queue: list[Job] = []
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "intake-commit")

    def admit(
        self, node_id: str, update_id: str, make: Make, answer: Callable[[UpdateRecord], T], done: Future[T]
    ) -> None:
        """Append what `make` returns, then set `done` to the answer, or to what either raised.

        `make` may read the state and raise a CentralError. It sees the state before all updates of its transaction, two of
        one node never share one, and so it must depend on other nodes' updates in no way. `answer` holds up the next ones.
        """
        with self._lock:
            self._queue.append(Job(node_id, update_id, make, answer, done))
        self._thread.submit(self._commit_waiting)

    def _commit_waiting(self) -> None:
        """One transaction for everybody who waits; nothing when an earlier one took them along."""
        while jobs := self._take():
            self._commit(jobs)

    def _take(self) -> list[Job]:
        """The first waiting job of each node, in order."""
        first: dict[str, Job] = {}
        with self._lock:
            for job in self._queue:
                first.setdefault(job.node_id, job)
            self._queue = [job for job in self._queue if first[job.node_id] is not job]
        return list(first.values())

    def _commit(self, jobs: list[Job]) -> None:
        try:
            with self._journal.read() as state:
                self._journal.append(*(event for job in jobs for event in job.make(state)))
                records = [state.updates[job.update_id] for job in jobs]
        except CentralError as error:
            if len(jobs) > 1:  # nothing was recorded, and perhaps one of them is alone at fault
                for job in jobs:
                    self._commit([job])
            else:
                jobs[0].done.set_exception(error)
        except BaseException as error:  # not ours to judge, but nobody may wait for ever
            for job in jobs:
                job.done.set_exception(error)
        else:
            for job, record in zip(jobs, records, strict=True):
                _settle(job.done, partial(job.answer, record))


def _settle(done: Future[T], work: Callable[[], T]) -> None:
    """Set `done` to what `work` returns or raises."""
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)
