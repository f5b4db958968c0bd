"""The learner's sign of life, and how long there was none.

In: `Beat.touch`, called by the learner's working thread between its steps. Out: seconds without a
new touch, by the clock of the process that looks. The wall clock may jump: only whether the file
changed counts, not when.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

LOOK_S = 5.0
"""How often the supervisor looks; also the longest time that an idle learner sleeps in one go."""
SILENT_S = 600.0
"""A learner that did not touch the file for so long hangs. The longest healthy pause between two
touches is the loading of the base model, which takes minutes at most; in a training step each layer
touches it.
"""


class Beat:
    """The file `learning/beat` of a data directory."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir.absolute() / "learning" / "beat"

    def touch(self) -> None:
        """Raises OSError when the disk does not take it, or the folder is not there."""
        self._path.touch()

    def seen(self) -> int:
        """Changes with each touch; 0 before the first one, and while the disk does not answer."""
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return 0


class Silence:
    """Begin one when a learner starts, and call `look` every `LOOK_S` seconds."""

    def __init__(self, beat: Beat, clock: Callable[[], float] = time.monotonic) -> None:
        self._beat = beat
        self._clock = clock
        self._seen = beat.seen()
        self._looked = clock()
        self._silent_s = 0.0

    def look(self) -> float:
        """Seconds without a new touch.

        When the one who looks was held up itself (a paused container), the learner was too: of such
        a gap only two looks' time counts.
        """
        now, seen = self._clock(), self._beat.seen()
        if seen == self._seen:
            self._silent_s += min(now - self._looked, 2 * LOOK_S)
        else:
            self._silent_s = 0.0
        self._looked, self._seen = now, seen
        return self._silent_s
