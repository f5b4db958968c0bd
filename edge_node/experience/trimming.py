"""Keeps the experience store within its bounds of age and size while the node runs.

In: settings, the store, how far an unfinished round reads. Out: a store within its bounds, every
PERIOD_S; the problem of room `retention` when it is not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from edge_node.errors import StorageError
from edge_node.experience.store import ExperienceStore
from edge_node.experience_settings import ExperienceSettings
from edge_node.problems import Problems

log = logging.getLogger(__name__)

PERIOD_S = 60.0
ROOM = "retention"
MIB = 1 << 20


class Trimmer:
    """Made once by the supervisor."""

    def __init__(
        self,
        settings: ExperienceSettings,
        store: ExperienceStore,
        reads: Callable[[], int],
        problems: Problems,
    ) -> None:
        """reads: number of the newest feedback that an unfinished round reads; 0 without one."""
        self._settings = settings
        self._store = store
        self._reads = reads
        self._problems = problems

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.to_thread(self.trim)
            await asyncio.sleep(PERIOD_S)

    def prepare(self) -> None:
        """Before anything else uses the store: makes one of earlier software able to shrink."""
        if self._settings.retention_days is None and self._settings.max_mib is None:
            return
        try:
            self._store.make_shrinkable()
        except StorageError as error:  # its room is used again all the same, but not given back
            log.warning("The experience store cannot shrink", extra={"cause": str(error)})

    def trim(self) -> None:
        """Once; says what fails, and raises nothing of the disk."""
        days, most_mib = self._settings.retention_days, self._settings.max_mib
        removed = 0
        try:
            if days is not None:
                removed += self._store.remove_older(days, self._reads)
            if most_mib is not None:
                removed += self._store.remove_beyond(most_mib * MIB, self._reads)
            held = self._store.held_bytes()
        except StorageError as error:
            self._problems.report(
                ROOM,
                f"Old answers are not removed: {error}",
                "Check the disk of EDGE_DATA_DIR; the node tries again every minute.",
            )
            return
        if removed:
            log.info("Answers removed by retention", extra={"count": removed, "held_bytes": held})
        if most_mib is not None and held > most_mib * MIB:
            self._problems.report(
                ROOM,
                f"experience.db holds {held // MIB} MiB; EDGE_EXPERIENCE__MAX_MIB is {most_mib}. "
                "What is left is read by a round that has not ended.",
                "Nothing, once that round has ended (`edge-node rounds list`); or raise the bound.",
            )
        else:
            self._problems.clear(ROOM)
