"""How much central's work grows with its history: 1,000 updates beside 100,000, in one process.

In: nothing but a temporary directory (`TMPDIR`). Out: figures; with `--json` one object as the last
line. Two journals of one shape are written straight into SQLite: 200 nodes, a merge of every 10
updates, for each release an evaluation with three reports, a verdict, a promotion and five nodes
that say they serve it; a second cohort has a candidate that is being evaluated. Then both are
opened and asked the same in turns; a figure is the median of its turns in processor time, because a
disk that waits is not what is measured.

Run: `python -m benchmarks.history [--json] [--seed 0]`; about two minutes, 1 GB of memory and 1 GB
of disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import describe_machine, peak_rss_mb
from benchmarks.long_history import (
    AT,
    NODES,
    PER_MERGE,
    REPORTS,
    SHARED,
    TRYING,
    History,
    admitted,
    update_of,
)
from central.cohort.looks import has_quorum, offers_of
from central.cohort.planning import plan_merge
from central.fleet.presence import Presence
from central.journal import (
    EventKind,
    Journal,
    NewEvent,
    ReleaseRecord,
    State,
    import_journal,
)
from central.operators.lineage import explain_release
from central.releases.canary import find_soak
from central.settings import ChannelPolicy, MergePolicy
from protos.manifest import ReleaseManifest

SIZES = (1_000, 100_000)
"""Updates; the second is what an operator has after years."""
TURNS, APPENDS, LOOKS = 9, 40, 40
"""Turns that each journal gets, and how many appends and looks are timed in one."""
RATIO = 2.0
"""What an append and a look at the longer history may cost at most, as a multiple of the shorter.
"""
EXPLAIN_MS = 1000.0
"""What explaining a release may take at most, however long the history."""
POLICY = MergePolicy(min_updates=10**9, max_age_s=1e12)
SOAK = ChannelPolicy()


@dataclass
class Opened:
    """One journal under measurement."""

    journal: Journal
    head: ReleaseManifest
    events: int
    open_cpu_s: float
    collect_cpu_s: float
    admitted: int = 10**9
    append_ms: list[float] = field(default_factory=list)
    idle_ms: list[float] = field(default_factory=list)
    evaluating_ms: list[float] = field(default_factory=list)
    explain_ms: list[list[float]] = field(default_factory=list)
    """Each turn: of the first, the middle and the newest release."""

    def take_turn(self) -> None:
        """Time some appends and looks."""
        self.append_ms.append(cpu_ms(self.admit, APPENDS))
        with self.journal.read() as state:
            self.idle_ms.append(cpu_ms(lambda: look_idle(state), LOOKS))
            self.evaluating_ms.append(cpu_ms(lambda: look_evaluating(state), LOOKS))
            merged = [
                release
                for release in state.releases.values()
                if release.cohort == SHARED and release.plan_id
            ]
            chosen = merged[0], merged[len(merged) // 2], merged[-1]
            self.explain_ms.append(
                [cpu_ms(partial(look_explaining, state, release), 1) for release in chosen]
            )

    def admit(self) -> None:
        """What intake asks and appends for one update."""
        self.admitted += 1
        update = update_of(self.head, self.admitted % NODES, self.admitted)
        with self.journal.read() as state:
            assert update.digest not in state.updates
            assert not state.is_forgotten_payload(SHARED, update.payload.digest_sha256)
            state.kept_bytes(update.node_id)
            earlier = state.updates_from(update.node_id, update.start.release)
            superseded = [
                NewEvent(EventKind.UPDATE_SUPERSEDED, SHARED, old.update_id, {"by": update.digest})
                for old in earlier
                if old.state == "waiting"
            ]
            self.journal.append(admitted(update, SHARED), *superseded)


def look_idle(state: State) -> None:
    """What the loop of a cohort without a merge asks after every append, whoever made it."""
    assert not state.open_plans(SHARED)
    assert find_soak(state, SHARED, SOAK) is None
    assert plan_merge(state, SHARED, POLICY, AT) is None


def look_evaluating(state: State) -> None:
    """What the loop of a cohort whose candidate is evaluated asks after every append."""
    (planned,) = state.open_plans(TRYING)
    assert planned.candidate is not None
    assert len(offers_of(state, planned.candidate)) == 1
    assert has_quorum(state, planned.candidate, REPORTS)


def look_explaining(state: State, release: ReleaseRecord) -> None:
    """What `central releases explain` asks of one release."""
    explained = explain_release(state, release, Presence().of)
    assert len(explained.contributions) == PER_MERGE
    assert explained.environments


def run(folder: Path, seed: int) -> dict[str, Any]:
    """The published keys."""
    opened = {size: open_history(folder, size, seed) for size in SIZES}
    for turn in range(TURNS):
        print(f"turn {turn + 1}/{TURNS}", file=sys.stderr)
        for one in opened.values():
            one.take_turn()
    small, large = (opened[size] for size in SIZES)
    for one in opened.values():
        one.journal.close()
    ratios = {
        key: statistics.median(getattr(large, f"{key}_ms"))
        / statistics.median(getattr(small, f"{key}_ms"))
        for key in ("append", "idle", "evaluating")
    }
    explain_ms = [
        max(statistics.median(turns) for turns in zip(*one.explain_ms, strict=True))
        for one in (small, large)
    ]
    return {
        "updates": list(SIZES),
        "releases": [size // PER_MERGE for size in SIZES],
        "nodes": NODES,
        "events": [one.events for one in (small, large)],
        **{
            f"{key}_ms": [
                round(statistics.median(getattr(one, f"{key}_ms")), 4) for one in (small, large)
            ]
            for key in ratios
        },
        **{f"{key}_ratio": round(ratio, 2) for key, ratio in ratios.items()},
        # The slowest of the first, the middle and the newest release.
        "explain_ms": [round(each, 2) for each in explain_ms],
        "open_cpu_s": [round(one.open_cpu_s, 2) for one in (small, large)],
        "open_us_per_event": [
            round(one.open_cpu_s / one.events * 1e6, 1) for one in (small, large)
        ],
        # One search for garbage that walks the state: what `central serve` spares its threads.
        "collect_cpu_s": [round(one.collect_cpu_s, 2) for one in (small, large)],
        "peak_rss_mb": peak_rss_mb(),
        "seed": seed,
        "machine": describe_machine(),
        "bars": {
            **{
                f"{key}_does_not_grow_with_history": ratio <= RATIO for key, ratio in ratios.items()
            },
            "explain_within_a_second": max(explain_ms) <= EXPLAIN_MS,
        },
    }


def open_history(folder: Path, updates: int, seed: int) -> Opened:
    """Write a journal of so many updates, and open it."""
    print(f"writing {updates} updates", file=sys.stderr)
    url, history = f"sqlite:///{folder}/{updates}.db", History(updates, seed)
    import_journal(url, history.events())
    gc.collect()
    begun = time.process_time()
    journal = Journal(url)
    opened = time.process_time()
    gc.collect()
    collected = time.process_time()
    gc.freeze()  # as central does when it has opened its stores
    with journal.read() as state:
        return Opened(
            journal, history.heads[SHARED], state.sequence, opened - begun, collected - opened
        )


def cpu_ms(call: Callable[[], None], times: int) -> float:
    """Processor time of one call in milliseconds, the mean of `times`."""
    begun = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - begun) / times * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.history", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--json", action="store_true", help="print the figures as one JSON object, the last line"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorikeet-history-") as folder:
        figures = run(Path(folder), arguments.seed)
    for key, value in figures.items():
        print(f"{key:40s} {value}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
