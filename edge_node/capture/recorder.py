"""Makes finished answers durable without holding up the event loop.

In: `Finished` answers from the event loop. Out: interactions in the experience store,
group-committed by one writer thread. Guarantees: `keep` returns within the deadline and raises
nothing but cancellation; once an answer has waited in vain, no other one waits until the disk
answers; every answer is counted once.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from edge_node.capture.answers import Finished, to_interaction
from edge_node.errors import EdgeError
from edge_node.experience import ExperienceStore, Interaction
from edge_node.problems import Problems
from lorikeet import traces

logger = logging.getLogger(__name__)

GROUP = 256
"""Most answers in one transaction."""
CALM_S = 10.0
"""Answers are kept again when one is and none was lost for so long."""
NEXT_STEP = (
    "Check the disk of EDGE_DATA_DIR (space, speed); "
    "a longer EDGE_CAPTURE__QUEUE_SIZE bridges a slow one."
)


@dataclass(frozen=True)
class RecorderCounts:
    captured: int
    lost: int
    skipped: int


class _Fate(Enum):
    WAITING = "waiting"
    CAPTURED = "captured"
    LOST = "lost"
    SKIPPED = "skipped"


@dataclass(eq=False)
class _Entry:
    finished: Finished
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
    fate: _Fate = field(default=_Fate.WAITING)


class Recorder:
    """Bounded queue and writer thread in front of an ExperienceStore."""

    def __init__(
        self,
        store: ExperienceStore,
        *,
        queue_size: int,
        durable_timeout_s: float,
        problems: Problems,
        parse: Callable[[Finished], Interaction | None] = to_interaction,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._durable_timeout_s = durable_timeout_s
        self._parse = parse
        self._queue: queue.Queue[_Entry | None] = queue.Queue(queue_size)
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(_Fate, 0)
        self.prompt_tokens = 0
        """Of what was captured, as `answer_tokens`."""
        self.answer_tokens = 0
        self._problems = problems
        self._clock = clock
        self._causes: set[str] = set()
        """Why answers have been lost in this streak; it ends when none was for CALM_S."""
        self._lost_at = -CALM_S
        self._writes = False
        """Whether the last group reached the disk."""
        self._stuck = False
        """An answer waited in vain, and no group has reached its end since."""
        self._writer = threading.Thread(
            target=self._write_groups, name="lorikeet-capture", daemon=True
        )
        self._writer.start()

    async def keep(self, finished: Finished) -> bool:
        """Waits at most durable_timeout_s for `finished` to be on disk; False: lost or skipped."""
        entry = _new_entry(finished)
        if not self._put(entry):
            return False
        try:
            with traces.part("capture"):
                async with asyncio.timeout(0 if self._stuck else self._durable_timeout_s):
                    await entry.done
        except TimeoutError:
            if self._settle(entry, _Fate.LOST):
                self._stuck = True
                self._report("disk did not keep up")
        return entry.fate is _Fate.CAPTURED

    def offer(self, finished: Finished) -> None:
        """As `keep` for an answer that nobody waits for: its client went away."""
        self._put(_new_entry(finished))

    def _put(self, entry: _Entry) -> bool:
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self._settle(entry, _Fate.LOST)
            self._report("capture queue is full")
            return False
        return True

    def counts(self) -> RecorderCounts:
        with self._lock:
            return RecorderCounts(
                self._counts[_Fate.CAPTURED], self._counts[_Fate.LOST], self._counts[_Fate.SKIPPED]
            )

    def close(self) -> None:
        """Writes what is queued and ends the thread; idempotent."""
        if self._writer.is_alive():
            self._queue.put(None)
            self._writer.join()

    def _write_groups(self) -> None:
        while True:
            try:
                group = [self._queue.get(timeout=CALM_S if self._causes else None)]
            except queue.Empty:
                self._calm_down()
                continue
            while len(group) < GROUP:
                try:
                    group.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            self._write([entry for entry in group if entry is not None])
            if None in group:
                return

    def _write(self, group: list[_Entry]) -> None:
        # An answer that was given up counts as lost already. Without it a slow disk catches up.
        rows: list[tuple[_Entry, Interaction]] = []
        for entry in group:
            if entry.fate is not _Fate.WAITING:
                continue
            try:
                row = self._parse(entry.finished)
            except Exception as error:
                self._settle(entry, _Fate.LOST)
                self._report(f"answer not readable ({type(error).__name__})")
                continue
            if row is None:
                self._settle(entry, _Fate.SKIPPED)
            else:
                rows.append((entry, row))
        if rows:
            try:
                self._store.add_interactions([row for _, row in rows])
                fate, self._writes = _Fate.CAPTURED, True
                self.prompt_tokens += sum(len(row.prompt_ids) for _, row in rows)
                self.answer_tokens += sum(len(row.answer_ids) for _, row in rows)
                self._calm_down()
            except Exception as error:
                fate, self._writes = _Fate.LOST, False
                # Another error's words might quote the answer, and the cause goes to central.
                self._report(str(error) if isinstance(error, EdgeError) else type(error).__name__)
            for entry, _ in rows:
                self._settle(entry, fate)
        self._stuck = False
        for loop in {entry.loop for entry in group}:
            waiting = [entry.done for entry in group if entry.loop is loop]
            try:
                loop.call_soon_threadsafe(_release, waiting)
            except RuntimeError:  # the loop is closed: nobody waits any more
                pass

    def _settle(self, entry: _Entry, fate: _Fate) -> bool:
        """Decides the entry's fate once; False when it was decided before."""
        with self._lock:
            if entry.fate is not _Fate.WAITING:
                return False
            entry.fate = fate
            self._counts[fate] += 1
            return True

    def _report(self, cause: str) -> None:
        # Once per streak and cause: a full disk must not fill the log as well.
        self._lost_at = self._clock()
        if cause not in self._causes:
            self._causes.add(cause)
            logger.warning("Interactions are being lost", extra={"cause": cause})
            text = f"Answers go out but are not kept, so nothing is learnt from them: {cause}."
            # In a thread of its own: the event loop must not wait for a slow disk.
            threading.Thread(
                target=self._problems.report, args=("capture", text, NEXT_STEP), daemon=True
            ).start()

    def _calm_down(self) -> None:
        if self._writes and self._clock() - self._lost_at >= CALM_S:
            self._causes.clear()
            self._problems.clear("capture")


def _new_entry(finished: Finished) -> _Entry:
    loop = asyncio.get_running_loop()
    return _Entry(finished, loop, loop.create_future())


def _release(waiting: list[asyncio.Future[None]]) -> None:
    for done in waiting:
        if not done.done():
            done.set_result(None)
