"""How much faster a merge is with two workers than with one.

In: one layer's updates. Out: figures. Both merge the same, in turns and in one process, so load on
the machine meets both; a ratio is of two runs that follow each other, and the median is taken.
`cores_used` is CPU-seconds per wall second with two workers: on a machine where others compute it
says how much of a second core there was to have. Guarantee: none of them is timed with more than
one BLAS thread a worker.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from central.merging import ProductSum
from protos.lora import LoraTensors, encode
from protos.manifest import sha256_hex

REPEATS = 9
COPIES = 4
"""Layers of a merge. They share their arrays, so that memory is that of one."""


@dataclass(frozen=True)
class SideBySide:
    """Medians of REPEATS pairs."""

    speed_up: float
    largest_speed_up: float
    cores_used: float
    """CPU-seconds per wall second with two workers."""
    cpu_s_ratio: float
    """CPU-seconds with two workers over those with one."""
    same_bytes: bool


@dataclass(frozen=True)
class _Run:
    wall_s: float
    cpu_s: float
    digest: str


def side_by_side(layer: Sequence[LoraTensors], rank: int, exact_rank: int, seed: int) -> SideBySide:
    """One worker against two."""
    updates = [_copied(update) for update in layer]
    pairs: list[tuple[_Run, _Run]] = []
    _run(updates, rank, exact_rank, seed, workers=2)  # warms caches
    for repeat in range(REPEATS):
        order = (1, 2) if repeat % 2 else (2, 1)
        runs = {workers: _run(updates, rank, exact_rank, seed, workers) for workers in order}
        pairs.append((runs[1], runs[2]))
    ratios = [one.wall_s / two.wall_s for one, two in pairs]
    return SideBySide(
        speed_up=statistics.median(ratios),
        largest_speed_up=max(ratios),
        cores_used=statistics.median(two.cpu_s / two.wall_s for _, two in pairs),
        cpu_s_ratio=statistics.median(two.cpu_s / one.cpu_s for one, two in pairs),
        same_bytes=len({run.digest for pair in pairs for run in pair}) == 1,
    )


def _copied(update: LoraTensors) -> LoraTensors:
    return LoraTensors(
        {
            f"{index}.{name}": module
            for index in range(COPIES)
            for name, module in update.modules.items()
        }
    )


def _run(
    updates: Sequence[LoraTensors], rank: int, exact_rank: int, seed: int, workers: int
) -> _Run:
    wall, cpu = time.perf_counter(), time.process_time()
    total = ProductSum(rank=rank, seed=seed, exact_rank=exact_rank, workers=workers)
    for update in updates:
        total.add(update, 1 / len(updates))
    merged = total.result()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return _Run(wall, cpu, sha256_hex(encode(merged.tensors)))
