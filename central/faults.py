"""Fault points: named steps at which a test ends central as `kill -9` would.

In: the variable `LORIKEET_CENTRAL_FAULT`, `<point>#<n>`, read once when central's process starts.
Out: SIGKILL to this process when the point is reached for the n-th time. Without the variable
`reach` compares one name with None and returns. It cannot be set by accident: it has not central's
prefix (every unknown CENTRAL_* is refused, and no chart or compose file has a place for it), the
value must be a known point with a count, anything else ends the start with an error, and an armed
process says so in its log.
"""

from __future__ import annotations

import logging
import os
import signal
import threading

from central.errors import SettingsError

VARIABLE = "LORIKEET_CENTRAL_FAULT"
INTAKE = (
    "intake.begun",  # the header is checked, nothing is on disk
    "intake.chunk_written",
    "intake.checked",  # the payload is complete and good, but not yet a blob
    "intake.kept",  # it is a blob, but not yet in the journal
    "intake.recorded",  # it is in the journal, and its bytes still lie among the unfinished ones
    "intake.admitted",  # it is in the journal, but the node has no receipt
)
BLOBS = ("blob.written", "blob.published")
HEAD = (
    "head.kept",  # what was recorded is in the head too, and nobody knows yet
    "head.copied",
)
SPACE = ("space.ballast_released",)
RETENTION = (
    "journal.blobs_collected.applied",
    "journal.blobs_collected.stored",  # it is said, and nothing is deleted yet
    "retention.deleted",
    "journal.collection_finished.applied",
    "journal.collection_finished.stored",
)
TRANSFER = (  # backup, restore and accept-loss: processes of their own
    "backup.journal",
    "backup.blob",
    "backup.complete",  # all of it is on disk, and has not its name yet
    "restore.begun",
    "restore.blob",
    "restore.keys",
    "restore.journal",  # all of it is there, but not checked
    "journal.journal_loss_accepted.applied",
    "journal.journal_loss_accepted.stored",
)
MERGE = ("merge.computed", "merge.candidate_kept", "merge.state_kept", "merge.own_kept")
POINTS = {*INTAKE, *BLOBS, *HEAD, *SPACE, *RETENTION, *TRANSFER, *MERGE}
"""All points.

The journal adds two for every kind of event: `journal.<kind>.applied` (not on disk yet) and
`journal.<kind>.stored` (on disk, but nobody knows yet).
"""

log = logging.getLogger(__name__)
_lock = threading.Lock()
_armed: str | None = None
_left = 0


def arm() -> None:
    """Read the variable; raises SettingsError for a value that names no fault point."""
    global _armed, _left
    value = os.environ.get(VARIABLE)
    if value is None:
        return
    point, _, count = value.partition("#")
    if point not in POINTS or not count.isdecimal() or int(count) < 1:
        raise SettingsError(
            f"{VARIABLE} is {value!r}. It is for crash tests only: unset it. Expected <point>#<n> "
            "with a point of central/faults.py."
        )
    log.warning("this process will kill itself", extra={"fault_point": point, "after": int(count)})
    _armed, _left = point, int(count)


def reach(point: str) -> None:
    """Say that `point` is reached."""
    global _left
    if _armed is None or point != _armed:
        return
    with _lock:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()  # nothing may run before the signal arrives
