"""How much central's work grows with the length of its history: 1,000 updates beside 100,000, in one process.

In: nothing but a temporary directory (`TMPDIR`). Out: figures; with `--json` one object as the last line. Two journals of one shape
are written straight into SQLite: 200 nodes, a merge of every 10 updates, for each release an evaluation with three reports, a
verdict, a promotion and five nodes that say they serve it; a second cohort has a candidate that is being evaluated. Then both are opened
and asked the same in turns; a figure is the median of its turns in processor time, because a disk that waits is not what is measured.

Run: `python -m benchmarks.history [--json] [--seed 0]`; about two minutes, 1 GB of memory and 1 GB of disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import describe_machine, peak_rss_mb
from central.federation.looks import has_quorum, offers_of
from central.federation.planning import plan_merge
from central.fleet.presence import Presence
from central.journal import (
    Event,
    EventKind,
    Journal,
    MergePlan,
    NewEvent,
    PlannedUpdate,
    ReleaseRecord,
    State,
    import_journal,
)
from central.journal.events import FIRST_HASH, chain
from central.operator.lineage import explain_release
from central.registry.canary import find_soak
from central.settings import ChannelPolicy, MergePolicy
from protos.manifest import Payload, ReleaseManifest, Start, UpdateManifest, sha256_hex

SIZES = (1_000, 100_000)
"""Updates; the second is what an operator has after years."""
NODES, PER_MERGE, REPORTS, SERVED = 200, 10, 3, 5
TURNS, APPENDS, LOOKS = 9, 40, 40
"""Turns that each journal gets, and how many appends and looks are timed in one."""
RATIO = 2.0
"""What an append and a look at the longer history may cost at most, as a multiple of the shorter."""
EXPLAIN_MS = 1000.0
"""What explaining a release may take at most, however long the history."""
AT = "2026-11-22T12:00:00.000000Z"
BASE = sha256_hex(b"base")
SHARED, TRYING = "shared", "trying"
POLICY = MergePolicy(min_updates=10**9, max_age_s=1e12)
SOAK = ChannelPolicy()
FINDING: dict[str, Any] = {
    "anchor": False,
    "nodes": REPORTS,
    "fall_points": -2.0,
    "tolerance_points": 1.0,
    "p_reference": 0.9,
    "p_fine": 0.01,
    "standing": "fine",
    "better": False,
    "attempts": 1,
    "total": 100,
}
"""What a verdict says of an environment beside its counts and reference."""
COUNTS = {"both": 80, "only_reference": 1, "only_candidate": 3, "neither": 16}


class History:
    """The events of one journal, in order."""

    def __init__(self, updates: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._updates = updates
        self._sequence, self._hash = 0, FIRST_HASH
        self.heads: dict[str, ReleaseManifest] = {}

    def events(self) -> Iterator[Event]:
        """The whole chain."""
        for cohort, nodes in ((SHARED, range(NODES)), (TRYING, range(NODES, NODES + REPORTS))):
            yield from map(self._chained, self._started(cohort, nodes))
        for first in range(0, self._updates, PER_MERGE):
            yield from map(self._chained, self._merged(SHARED, first))
        yield from map(self._chained, self._merged(TRYING, self._updates, decide=False))

    def _chained(self, new: NewEvent) -> Event:
        event = chain(new, self._sequence + 1, AT, self._hash)
        self._sequence, self._hash = event.sequence, event.hash
        return event

    def _started(self, cohort: str, nodes: range) -> Iterator[NewEvent]:
        genesis = release_of(cohort, 0)
        self.heads[cohort] = genesis
        yield NewEvent(EventKind.COHORT_CREATED, cohort, genesis.digest, signed(genesis.to_bytes()))
        token = {"secret_sha256": BASE, "uses": len(nodes), "expires_at": "2999-01-01T00:00:00Z", "by": "benchmark"}
        yield NewEvent(EventKind.TOKEN_CREATED, cohort, f"token-{cohort}", token)
        for number in nodes:
            body = {
                "name": f"node{number}",
                "token_id": f"token-{cohort}",
                "public_key_pem": "x" * 178,
                "base": BASE,
                "certificate_sha256": BASE,
            }
            yield NewEvent(EventKind.NODE_ENROLLED, cohort, node_id(number), body)

    def _merged(self, cohort: str, first: int, decide: bool = True) -> Iterator[NewEvent]:
        """Updates from the cohort's head, their merge, its evaluation, and with `decide` the release."""
        parent = self.heads[cohort]
        nodes = self._random.sample(range(NODES), PER_MERGE) if decide else list(range(NODES, NODES + REPORTS))
        updates = [update_of(parent, number, first + i + 1) for i, number in enumerate(nodes)]
        for update in updates:
            yield admitted(update, cohort)
        plan = MergePlan(
            cohort=cohort,
            parent=parent.digest,
            version=parent.version + 1,
            base=BASE,
            updates=[
                PlannedUpdate(update_id=u.digest, payload=u.payload.digest_sha256, weight=1 / len(updates))
                for u in updates
            ],
            strategy="product-mean",
            rank=32,
            server_step=1.0,
            seed=0,
            exact_rank=512,
            software="benchmark",
            created_at=AT,
        )
        yield NewEvent(EventKind.MERGE_PLANNED, cohort, plan.digest, {"plan": plan.to_bytes().decode()})
        candidate = release_of(
            cohort, plan.version, parent.digest, plan.digest, [planned.update_id for planned in plan.updates]
        )
        body = {"plan_id": plan.digest, **signed(candidate.to_bytes())}
        yield NewEvent(EventKind.CANDIDATE_BUILT, cohort, candidate.digest, body)
        asked = [node_id(number) for number in nodes[:REPORTS]]
        offer = {
            "candidate": candidate.digest,
            "reference": parent.digest,
            "tasks": 100,
            "deadline_at": AT,
            "nodes": asked,
        }
        offer_id = f"{cohort}-{plan.version}"
        yield NewEvent(EventKind.EVALUATION_OFFERED, cohort, offer_id, offer)
        results = [{"environment": "work", **{f"{key}_passed": value for key, value in COUNTS.items()}}]
        for node in asked:
            report = {"node_id": node, "results": results, "abstain_reason": ""}
            yield NewEvent(EventKind.EVALUATION_REPORTED, cohort, offer_id, report)
        if decide:
            environments = {"work": {**FINDING, **COUNTS, "reference": parent.digest}}
            verdict = {"accepted": True, "text": "accepted", "environments": environments, "high_water": {}}
            yield NewEvent(EventKind.VERDICT, cohort, candidate.digest, verdict)
            yield NewEvent(EventKind.PROMOTED, cohort, candidate.digest, {"channel": "stable", "by": "gate"})
            for number in self._random.sample(range(NODES), SERVED):
                yield NewEvent(EventKind.RELEASE_SERVED, cohort, candidate.digest, {"node_id": node_id(number)})
            self.heads[cohort] = candidate


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
            merged = [release for release in state.releases.values() if release.cohort == SHARED and release.plan_id]
            chosen = merged[0], merged[len(merged) // 2], merged[-1]
            self.explain_ms.append([cpu_ms(partial(look_explaining, state, release), 1) for release in chosen])

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
        key: statistics.median(getattr(large, f"{key}_ms")) / statistics.median(getattr(small, f"{key}_ms"))
        for key in ("append", "idle", "evaluating")
    }
    explain_ms = [
        max(statistics.median(turns) for turns in zip(*one.explain_ms, strict=True)) for one in (small, large)
    ]
    return {
        "updates": list(SIZES),
        "releases": [size // PER_MERGE for size in SIZES],
        "nodes": NODES,
        "events": [one.events for one in (small, large)],
        **{
            f"{key}_ms": [round(statistics.median(getattr(one, f"{key}_ms")), 4) for one in (small, large)]
            for key in ratios
        },
        **{f"{key}_ratio": round(ratio, 2) for key, ratio in ratios.items()},
        # The slowest of the first, the middle and the newest release.
        "explain_ms": [round(each, 2) for each in explain_ms],
        "open_cpu_s": [round(one.open_cpu_s, 2) for one in (small, large)],
        "open_us_per_event": [round(one.open_cpu_s / one.events * 1e6, 1) for one in (small, large)],
        # One search for garbage that walks the state: what `central serve` spares its threads.
        "collect_cpu_s": [round(one.collect_cpu_s, 2) for one in (small, large)],
        "peak_rss_mb": peak_rss_mb(),
        "seed": seed,
        "machine": describe_machine(),
        "bars": {
            **{f"{key}_does_not_grow_with_history": ratio <= RATIO for key, ratio in ratios.items()},
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
        return Opened(journal, history.heads[SHARED], state.sequence, opened - begun, collected - opened)


def cpu_ms(call: Callable[[], None], times: int) -> float:
    """Processor time of one call in milliseconds, the mean of `times`."""
    begun = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - begun) / times * 1e3


def node_id(number: int) -> str:
    return f"node{number}-{number:08x}"


def release_of(
    cohort: str, version: int, parent: str | None = None, plan: str | None = None, updates: list[str] | None = None
) -> ReleaseManifest:
    """A release whose payload is nowhere."""
    return ReleaseManifest(
        base=BASE,
        cohort=cohort,
        version=version,
        parent=parent,
        plan=plan,
        payload=Payload(digest_sha256=sha256_hex(f"{cohort} {version}".encode()), size_bytes=1_000_000),
        rank=32 if version else 0,
        truncation_error=0.01,
        updates=updates or [],
        created_at=AT,
    )


def update_of(start: ReleaseManifest, number: int, sequence: int) -> UpdateManifest:
    """An update whose payload is nowhere."""
    return UpdateManifest(
        node_id=node_id(number),
        sequence=sequence,
        base=BASE,
        start=Start(
            release=start.digest, payload=start.payload.digest_sha256, prefix_rank=start.rank, dtype="bfloat16"
        ),
        rank=16,
        payload=Payload(digest_sha256=sha256_hex(f"{number} {sequence}".encode()), size_bytes=1_000_000),
        round_id=f"round-{sequence}",
        experiences=64,
        metrics={"loss": 0.5, "pass_rate": 0.75},
        created_at=AT,
        software="benchmark",
    )


def admitted(update: UpdateManifest, cohort: str) -> NewEvent:
    return NewEvent(EventKind.UPDATE_ADMITTED, cohort, update.digest, signed(update.to_bytes()))


def signed(document: bytes) -> dict[str, str]:
    """As central keeps a signed document; the signature's length is that of a real one."""
    return {"manifest": document.decode(), "signature": "M" * 96}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.history", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object, the last line")
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
