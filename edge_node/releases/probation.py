"""Which releases have proved themselves in vLLM, and which ones end it.

In: switches of the alias, and ends of vLLM. Out: what the next vLLM serves, and why a release is
kept away. A release is on probation from its switch on, until vLLM has served it for
EDGE_RELEASES__PROBATION_S. When vLLM ends EDGE_RELEASES__CRASHES times meanwhile, the node goes
back to the last release that proved itself. It keeps away from the other one until central names
another head. A release that ends vLLM while it is loaded counts in the same way.

Guarantees: `probation.json` keeps all of it, so that restarts of the node do not begin anew; a
damaged or unwritable one costs the memory, not the serving.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from edge_node.disk import write_file
from edge_node.errors import StorageError
from edge_node.problems import Problems
from edge_node.releases.store import ReleaseStore, StoredRelease
from edge_node.serving.loading import read_loading
from edge_node.settings import EdgeSettings

log = logging.getLogger(__name__)

FILE = Path("releases", "probation.json")
NEXT_STEP = (
    "Roll the release back at central (`central releases rollback`), or see why vLLM ended: "
    "logs/vllm.log.1 in EDGE_DATA_DIR. To try it here again, delete releases/probation.json and "
    "start the node."
)


class Avoided(BaseModel):
    """A release that this node does not load. since: RFC 3339 UTC."""

    label: str
    why: str
    since: str


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore")

    last_good: str | None = None
    """The release that a crash goes back to."""
    on_probation: list[str] = []
    """Release ids, the newest last."""
    crashes: dict[str, int] = {}
    avoided: dict[str, Avoided] = {}
    named: list[str] = []
    """What central named last."""


class Probation:
    """One for each supervisor. Its methods may be called from any thread."""

    def __init__(
        self,
        settings: EdgeSettings,
        store: ReleaseStore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock
        self._problems = Problems(settings.data_dir)
        self._record = _read(settings.data_dir)
        self._since: dict[str, float] = {}
        """When the vLLM that runs began to serve a release that is on probation."""
        self._unwritten = False
        self._lock = threading.RLock()

    @property
    def needed(self) -> set[str]:
        """Releases that may have to be served again."""
        with self._lock:
            good = self._record.last_good
            return {*self._record.on_probation, *([good] if good else [])}

    def switching(self, release: StoredRelease) -> None:
        """The alias is about to point at `release`. Raises StorageError."""
        with self._lock:
            before, record = self._active(), self._record
            if before is not None and before.release_id == release.release_id:
                return
            if before is not None and before.release_id not in record.on_probation:
                record.last_good = before.release_id
            # The new one takes the place of one that has not proved itself.
            gone = {before.release_id if before else "", release.release_id}
            new = [] if release.release_id == record.last_good else [release.release_id]
            record.on_probation = [one for one in record.on_probation if one not in gone] + new
            self._since.pop(release.release_id, None)
            if new:
                self._write()
            else:  # the way back does not wait for the disk
                self._unwritten = True

    def trying(self, release: StoredRelease) -> None:
        """A part of the requests is about to get `release`. Raises StorageError."""
        with self._lock:
            others = [one for one in self._record.on_probation if one != release.release_id]
            self._record.on_probation = [*others, release.release_id]
            self._write()

    def serves(self, release_id: str) -> None:
        """vLLM serves it now; said again and again."""
        with self._lock:
            if self._unwritten:
                self._keep()
            if release_id not in self._record.on_probation:
                return
            since = self._since.setdefault(release_id, self._clock())
            if self._clock() - since < self._settings.releases.probation_s:
                return
            self._record.on_probation.remove(release_id)
            self._record.crashes.pop(release_id, None)
            active = self._active()
            if active is not None and active.release_id == release_id:
                self._record.last_good = release_id
            log.info("release has proved itself", extra={"release_id": release_id})
            self._keep()

    def not_served(self, release_id: str) -> None:
        """vLLM runs, and does not serve it: what vLLM does from now on is not its fault."""
        with self._lock:
            if release_id in self._record.on_probation:
                self._record.on_probation.remove(release_id)
                self._since.pop(release_id, None)
                self._keep()

    def named(self, release_ids: Iterable[str]) -> None:
        """These are the heads that central names. A change forgets what was kept away."""
        with self._lock:
            ids, record = sorted(set(release_ids)), self._record
            if ids == record.named:
                return
            record.named = ids
            record.avoided = {name: why for name, why in record.avoided.items() if name in ids}
            record.crashes = {
                name: count
                for name, count in record.crashes.items()
                if name in ids or name in record.on_probation
            }
            self._keep()

    def why_avoided(self, release_id: str) -> str | None:
        """Why this node does not load it; None when it does."""
        with self._lock:
            avoided = self._record.avoided.get(release_id)
            return avoided.why if avoided else None

    def ended(self, cause: str, *, served: bool) -> bool:
        """vLLM ended. True: a release is to blame, and another vLLM may do better.

        `served`: it had begun to serve. Raises nothing.
        """
        with self._lock:
            self._since.clear()
            blamed = self._blamed(served)
            if blamed is None:
                return False
            crashes = self._record.crashes.get(blamed.release_id, 0) + 1
            self._record.crashes[blamed.release_id] = crashes
            log.warning(
                "vLLM ended with a release that has not proved itself",
                extra={"release": blamed.label, "crashes": crashes, "cause": cause},
            )
            better = crashes < self._settings.releases.crashes or self._avoid(blamed, cause)
            self._keep()
            return better

    def _blamed(self, served: bool) -> StoredRelease | None:
        name = read_loading(self._settings.data_dir)
        if name is not None:
            label = name.rpartition("@")[2]
            return next((one for one in self._store.newest() if one.label == label), None)
        if not served or not self._record.on_probation:
            return None
        return self._store.get(self._record.on_probation[-1])

    def _avoid(self, bad: StoredRelease, cause: str) -> bool:
        """False: nothing can be served in its place."""
        record, active = self._record, self._active()
        crashes = record.crashes[bad.release_id]
        why = f"vLLM ended {crashes} times soon after it got release {bad.label} ({cause})"
        if active is not None and active.release_id == bad.release_id:
            good = self._store.get(record.last_good) if record.last_good else None
            if good is None:
                self._problems.report(
                    "releases", f"{why}; no earlier release is here to go back to.", NEXT_STEP
                )
                return False
            try:
                self._store.activate(good)
            except StorageError as error:
                self._problems.report("releases", f"{why}; {error}", NEXT_STEP)
                return False
            why = f"{why}, so this node serves {good.label} again"
        record.on_probation = [name for name in record.on_probation if name != bad.release_id]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record.avoided[bad.release_id] = Avoided(label=bad.label, why=f"{why}.", since=now)
        self._problems.report("releases", f"{why}.", NEXT_STEP)
        return True

    def _active(self) -> StoredRelease | None:
        try:
            return self._store.active()
        except StorageError:  # the watcher says so
            return None

    def _keep(self) -> None:
        """As _write, but a full disk costs the memory alone."""
        try:
            self._write()
        except StorageError as error:
            log.warning("probation not written", extra={"why": str(error)})

    def _write(self) -> None:
        write_file(self._settings.data_dir / FILE, self._record.model_dump_json().encode())
        self._unwritten = False


def avoided_releases(data_dir: Path) -> dict[str, str]:
    """Label of each release that the node keeps away from, and why."""
    return {one.label: one.why for one in _read(data_dir).avoided.values()}


def _read(data_dir: Path) -> _Record:
    try:
        return _Record.model_validate(json.loads((data_dir / FILE).read_bytes()))
    except FileNotFoundError:
        return _Record()
    except (OSError, ValueError, ValidationError) as error:
        log.warning("probation not read", extra={"why": type(error).__name__})
        return _Record()
