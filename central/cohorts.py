"""One thread per cohort, in which its Flower loop runs.

In: cohorts, those in the journal and those created later. Out: nothing; the loops write to the
journal. Guarantees: a loop that fails is logged and started again from the journal after a pause,
ever longer; `close` ends all of them. The threads are daemons: a merge that does not end in time is
left, and done again from its plan at the next start.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from central.errors import CentralError
from central.journal import Event, EventKind, Journal
from lorikeet.pauses import doubling

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
LAST_PAUSE_S = 60.0
CLOSE_TIMEOUT_S = 10.0
_PROGRESS = frozenset(
    {
        EventKind.MERGE_PLANNED,
        EventKind.CANDIDATE_BUILT,
        EventKind.EVALUATION_OFFERED,
        EventKind.VERDICT,
        EventKind.FORGET_FAILED,
    }
)
"""Events after which what a loop failed of is past."""


class CohortThreads:
    """`run` is called as run(cohort, stop) and returns when `stop` is set."""

    def __init__(
        self,
        journal: Journal,
        run: Callable[[str, threading.Event], None],
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._journal = journal
        self._run = run
        self._first_pause_s = first_pause_s
        self._stop = threading.Event()
        self._threads: dict[str, threading.Thread] = {}
        self._failures: dict[str, str] = {}
        self._failing_since: dict[str, str] = {}
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Start a thread for every cohort there is, and for every one to come."""
        with self._journal.read() as state:
            self._unsubscribe = self._journal.add_listener(self._heard)
            for cohort in state.cohorts():
                self._start(cohort)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Ask every loop to end and wait for them for at most `timeout_s`; idempotent."""
        self._unsubscribe()
        self._stop.set()
        self._journal.wake()
        deadline = time.monotonic() + timeout_s
        for cohort, thread in self._threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning(
                    "merge left unfinished; the next start goes on from its plan",
                    extra={"cohort": cohort},
                )

    def failure(self, cohort: str) -> str:
        """Why the loop failed last, when, and when it tries again; empty once it went on."""
        return self._failures.get(cohort, "")

    def went_on(self, cohort: str) -> None:
        """What the cohort's loop failed of is past: it got further, or has nothing left to do."""
        self._failures.pop(cohort, None)
        self._failing_since.pop(cohort, None)

    def _heard(self, event: Event) -> None:
        if event.kind in _PROGRESS:
            self.went_on(event.cohort)
        if event.kind is EventKind.COHORT_CREATED:
            self._start(event.cohort)

    def _start(self, cohort: str) -> None:
        if cohort not in self._threads:
            thread = threading.Thread(
                target=self._supervise, args=(cohort,), name=f"cohort-{cohort}", daemon=True
            )
            self._threads[cohort] = thread
            thread.start()

    def _supervise(self, cohort: str) -> None:
        pauses = doubling(self._first_pause_s, LAST_PAUSE_S)
        while not self._stop.is_set():
            began, pause_s = time.monotonic(), next(pauses)
            try:
                self._run(cohort, self._stop)
            except Exception as error:
                why = str(error) if isinstance(error, CentralError) else repr(error)
                self._failures[cohort] = (
                    f"{why} ({self._when(cohort)}, tried again after {pause_s:g} s)"
                )
                log.exception(
                    "loop of a cohort failed; it starts again",
                    extra={"cohort": cohort, "pause_s": pause_s},
                )
            else:
                if not self._stop.is_set():
                    log.error(
                        "loop of a cohort ended by itself; it starts again",
                        extra={"cohort": cohort},
                    )
            if time.monotonic() - began > LAST_PAUSE_S:
                pauses = doubling(self._first_pause_s, LAST_PAUSE_S)
                pause_s = next(pauses)
            self._stop.wait(pause_s)

    def _when(self, cohort: str) -> str:
        now = f"{self._journal.clock()[:19]}Z"
        since = self._failing_since.setdefault(cohort, now)
        return f"at {now}" if since == now else f"since {since}, last at {now}"
