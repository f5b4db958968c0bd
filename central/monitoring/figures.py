"""Central's figures for Prometheus, read at each scrape.

In: the journal's state, presence, disks, calls. Out: metric families `lorikeet_central_*`, in base
units. Labels are cohorts, channels, states, methods, reasons and paths: no node, operator, token or
key has one. Guarantees: what is read grows with nodes, cohorts and what waits, never with the
journal; a part that cannot be read is left out and counted, and the rest is told.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from central import __version__
from central.calls import Calls
from central.fleet.presence import Presence
from central.intake.uploads import Uploads
from central.journal import Journal
from central.monitoring.families import counter, gauge
from central.monitoring.state_figures import journal_figures, node_figures
from central.space import Space
from central.webhooks.teller import Teller

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """Where the figures come from. `failure` says why a cohort's loop does not go on."""

    journal: Journal
    presence: Presence
    uploads: Uploads
    space: Space
    calls: Calls
    failure: Callable[[str], str]
    tellers: Sequence[Teller]
    journal_file: Path | None
    """SQLite's file; None for another database."""


def make_registry(sources: Sources) -> CollectorRegistry:
    """What the metrics port shows: ours, and `process_*`."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(Figures(sources))
    return registry


class Figures(Collector):
    """Satisfies prometheus_client's Collector."""

    def __init__(self, sources: Sources) -> None:
        self._from = sources
        self._failed: Counter[str] = Counter()

    def describe(self) -> Iterable[Metric]:
        """Empty: registering must not read the journal."""
        return []

    def collect(self) -> Iterator[Metric]:
        for part in (
            self._journal, self._nodes, self._uploads, self._disks, self._calls, self._webhooks,
        ):  # fmt: skip
            try:
                families = list(part())
            except Exception as error:  # one part must not hide the others
                self._failed[part.__name__.strip("_")] += 1
                log.warning("figures not read", extra={"part": part.__name__, "why": repr(error)})
                continue
            yield from families
        yield counter(
            "figures_unread_total",
            "Scrapes in which a part of the figures could not be read, by part.",
            ("part",),
            {(part,): number for part, number in self._failed.items()},
        )
        yield gauge("build_info", "1, with the version.", ("version",), {(__version__,): 1})

    def _journal(self) -> Iterator[Metric]:
        source = self._from
        yield from journal_figures(source.journal, source.failure)
        if source.journal_file is not None:
            yield gauge(
                "journal_bytes",
                "Size of the journal's SQLite file and its write-ahead log.",
                (),
                {(): _size_of(source.journal_file)},
            )

    def _nodes(self) -> Iterator[Metric]:
        return node_figures(self._from.journal, self._from.presence)

    def _uploads(self) -> Iterator[Metric]:
        files, size = self._from.uploads.unfinished()
        yield gauge("uploads_unfinished", "Uploads that are not complete.", (), {(): files})
        yield gauge("uploads_unfinished_bytes", "Their bytes on disk.", (), {(): size})

    def _disks(self) -> Iterator[Metric]:
        disks = self._from.space.disks()
        yield gauge(
            "disk_free_bytes",
            "Free bytes on a disk that central writes on.",
            ("path",),
            {(str(place),): disk.free for place, disk in disks.items()},
        )
        yield gauge(
            "disk_size_bytes",
            "Size of that disk.",
            ("path",),
            {(str(place),): disk.total for place, disk in disks.items()},
        )
        yield gauge(
            "uploads_stopped",
            "1 while no upload is taken because a disk is short of room.",
            (),
            {(): int(bool(self._from.space.shortage()))},
        )

    def _calls(self) -> Iterator[Metric]:
        yield counter(
            "calls_total",
            "Calls that ended, by method and result: OK, or why it was refused.",
            ("method", "result"),
            self._from.calls.counts(),
        )

    def _webhooks(self) -> Iterator[Metric]:
        tellers = self._from.tellers
        yield gauge(
            "webhook_events_waiting",
            "Events that a webhook has not taken yet, at least.",
            (),
            {(): sum(teller.waiting for teller in tellers)},
        )
        yield counter(
            "webhook_tries_total",
            "Tries to tell a webhook, by result.",
            ("result",),
            {
                ("told",): sum(teller.told for teller in tellers),
                ("failed",): sum(teller.failed for teller in tellers),
            },
        )


def _size_of(database: Path) -> int:
    wal = database.with_name(f"{database.name}-wal")
    return sum(path.stat().st_size for path in (database, wal) if path.exists())
