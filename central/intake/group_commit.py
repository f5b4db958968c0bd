"""Group commit: updates that are ready at the same time share one journal transaction, and so one fsync.

In: for each update, a function that says which events admit it. Out: a future with its record, set when its events are
durable. Guarantees: an error reaches only the update that it concerns; updates are admitted in the order in which they
came.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from central.errors import CentralError
from central.journal import Journal, NewEvent, State, UpdateRecord

Make = Callable[[State], Sequence[NewEvent]]


@dataclass(frozen=True)
class Job:
    """One update that is to be admitted."""

    node_id: str
    update_id: str
    make: Make
    done: Future[UpdateRecord] = field(default_factory=Future)


class GroupCommit:
    """One per journal; thread-safe. Its one thread commits all that wait, and while it does so the next ones gather."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._queue: list[Job] = []
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "intake-commit")

    def admit(self, node_id: str, update_id: str, make: Make) -> Future[UpdateRecord]:
        """Append what `make` returns; it may read the state and raise a CentralError.

        It sees the state before all updates of its transaction, two of one node never share one, and so it must depend on
        other nodes' updates in no way.
        """
        job = Job(node_id, update_id, make)
        with self._lock:
            self._queue.append(job)
        self._thread.submit(self._commit_waiting)
        return job.done

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
                job.done.set_result(record)
