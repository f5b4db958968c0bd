"""The values of a payload: finite, and no module's increment too large.

In: an open payload whose header was checked. Out: nothing, or `Refused`. Every value is read once, in blocks of
`BLOCK_BYTES`, so memory does not grow with the update. A sum of squares tells of each factor that ||A||_F and ||B||_F are
finite, and ||scale * B A||_F <= |scale| ||B||_F ||A||_F that nearly every increment is small enough; only where that bound
does not tell is the norm itself computed, with the module in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import grpc
import numpy as np

from central.errors import Reason, Refused
from protos.lora import Array, LoraModule

BLOCK_BYTES = 256 << 10
"""Read at once; each of the worker threads holds one block and its squares, both in the processor's cache."""
FLOAT_BYTES = 4
SMALLEST = 2.0**-126
"""A float32 square below this may have been lost."""
SUM_ERROR = 1.005
"""The float32 sum of a block of 2**16 squares is wrong by at most 2**16 * 2**-24 = 0.4 %, in whatever order it was made."""


class Entry(NamedTuple):
    """One factor in a payload's header; `begin` counts bytes from the end of the header."""

    dtype: str
    shape: tuple[int, int]
    begin: int

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def end(self) -> int:
        return self.begin + self.elements * FLOAT_BYTES


Factor = tuple[str, str]
"""Module and A or B."""


def check_values(
    descriptor: int, start: int, entries: Mapping[Factor, Entry], scales: Mapping[str, float], max_norm: float
) -> None:
    """Raises Refused for a value that is not finite or an increment above `max_norm`; `start` is the end of the header."""
    squares = sums_of_squares(descriptor, start, entries)
    for name, scale in scales.items():
        bound = abs(scale) * math.sqrt(squares[name, "A"]) * math.sqrt(squares[name, "B"])
        if not bound <= max_norm:  # also when it is NaN
            a, b = (_read(descriptor, start, entries[name, factor]) for factor in ("A", "B"))
            _check_module(name, LoraModule(a, b, scale), max_norm)


def sums_of_squares(descriptor: int, start: int, entries: Mapping[Factor, Entry]) -> dict[Factor, float]:
    """An upper bound of each factor's sum of squares, at most 0.6 % above it; NaN or infinite where a value is."""
    sums = {factor: entry.elements * SMALLEST for factor, entry in entries.items()}
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for begin, end, pieces in _blocks(entries):
            data = np.frombuffer(os.pread(descriptor, end - begin, start + begin), np.float32)
            offsets = [(piece_begin - begin) // FLOAT_BYTES for _, piece_begin in pieces]
            found = np.add.reduceat(np.square(data), offsets)
            for (factor, _), value in zip(pieces, found.tolist(), strict=True):
                sums[factor] += value * SUM_ERROR
    return sums


def _blocks(entries: Mapping[Factor, Entry]) -> Iterator[tuple[int, int, Sequence[tuple[Factor, int]]]]:
    """Ranges of at most `BLOCK_BYTES` that factors fill without a gap, each with the pieces of factors that begin in it."""
    begin = end = 0
    pieces: list[tuple[Factor, int]] = []
    for factor, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        at = entry.begin
        while at < entry.end:
            if pieces and (at != end or end - begin >= BLOCK_BYTES):
                yield begin, end, pieces
                pieces = []
            if not pieces:
                begin = at
            pieces.append((factor, at))
            at = end = min(entry.end, begin + BLOCK_BYTES)
    if pieces:
        yield begin, end, pieces


def _read(descriptor: int, start: int, entry: Entry) -> Array:
    data = os.pread(descriptor, entry.end - entry.begin, start + entry.begin)
    return np.frombuffer(data, np.float32).reshape(entry.shape)


def _check_module(name: str, module: LoraModule, max_norm: float) -> None:
    norm = increment_norm(module)
    # A value that is not finite makes the norm so (0 * inf is NaN): the values are looked at again only then.
    if not np.isfinite(norm) and not (np.isfinite(module.A).all() and np.isfinite(module.B).all()):
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            Reason.NOT_FINITE,
            f"Module {name!r} has NaN or infinite values; expected finite numbers.",
        )
    if not norm <= max_norm:
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            Reason.NORM_OUT_OF_BOUNDS,
            f"Module {name!r} has an increment of norm {norm:g}; central admits at most {max_norm:g} "
            "(CENTRAL_LIMITS__MAX_NORM).",
        )


def increment_norm(module: LoraModule) -> float:
    """||scale * B @ A||_F from the rank x rank Grams (float64), never from the dense product."""
    with np.errstate(invalid="ignore", over="ignore"):
        a = module.A.astype(np.float64)
        b = module.B.astype(np.float64)
        squared = float(np.sum((b.T @ b) * (a @ a.T)))
    return abs(module.scale) * math.sqrt(squared if not squared < 0 else 0.0)  # max() would lose a NaN
