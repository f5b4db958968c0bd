"""The values of a payload: finite, no factor or scale extreme, no module's increment too large, and not all of them zero.

In: where each factor lies, and the payload's bytes as they come. Out: nothing, or `Refused`. Every value is seen once, so
memory does not grow with the update. A sum of squares tells of each factor that ||A||_F and ||B||_F are finite, and
||scale * B A||_F <= |scale| ||B||_F ||A||_F that nearly every increment is small enough; only where that bound does not tell
is the norm itself computed, with the module read back from its file. Scale and factors have bounds of their own
(central/merging/bounds.py): a small product may hide an extreme scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np

from central.durable import storage
from central.errors import Reason, Refused
from central.merging.bounds import EMPTY, LEAST_NORM, excess, frobenius
from protos.lora import Array, LoraModule

FLOAT_BYTES = 4
SUM_VALUES = 1 << 16
"""Values of one float32 sum."""
SUM_ERROR = 1.005
"""A float32 sum of 2**16 squares is wrong by at most 2**16 * 2**-24 = 0.4 %, in whatever order it was made."""
SMALLEST = 2.0**-126
"""A float32 square below this may have been lost."""


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


Layout = tuple[tuple[Factor, Entry], ...]
"""Where the factors lie, from the payload's end to its beginning."""


def lay_out(entries: Mapping[Factor, Entry]) -> Layout:
    """Raises Refused for a factor that does not begin at a float's boundary."""
    for (module, factor), entry in entries.items():
        if entry.begin % FLOAT_BYTES:
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT,
                Reason.MALFORMED_PAYLOAD,
                f"Module {module!r} has {factor} at byte {entry.begin} of the values; expected a multiple of {FLOAT_BYTES}, where "
                "safetensors' writers put it.",
            )
    return tuple(sorted(entries.items(), key=lambda item: item[1].begin, reverse=True))


class SquareSums:
    """Sums of squares per factor, made as the values come."""

    def __init__(self, layout: Layout) -> None:
        self._left = list(layout)
        self._sums = {factor: entry.elements * SMALLEST for factor, entry in layout}

    def add(self, data: memoryview, begin: int) -> None:
        """Take in the bytes from `begin` of the values on, a multiple of 4 as their number; they come in order."""
        end = begin + len(data)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            while self._left and self._left[-1][1].begin < end:
                factor, entry = self._left[-1]
                at = max(entry.begin, begin)
                piece = np.frombuffer(data, np.float32, (min(entry.end, end) - at) // FLOAT_BYTES, at - begin)
                for first in range(0, len(piece), SUM_VALUES):
                    values = piece[first : first + SUM_VALUES]
                    # Not np.dot: BLAS would share it out over threads.
                    self._sums[factor] += float(np.einsum("i,i->", values, values)) * SUM_ERROR
                if entry.end > end:
                    return
                self._left.pop()

    @property
    def upper_bounds(self) -> Mapping[Factor, float]:
        """Of each factor's sum of squares, at most 0.6 % above it; NaN or infinite where a value is."""
        return self._sums


def check_norms(
    sums: SquareSums,
    path: Path,
    start: int,
    entries: Mapping[Factor, Entry],
    scales: Mapping[str, float],
    max_norm: float,
) -> None:
    """Raises Refused for a value that is not finite, a scale, factor or increment (above `max_norm`) that is too large, and for
    increments that are all zero; values begin at `start` of the file."""
    squares = sums.upper_bounds
    largest = 0.0
    for name, scale in scales.items():
        norm_a, norm_b = math.sqrt(squares[name, "A"]), math.sqrt(squares[name, "B"])
        bound = abs(scale) * norm_a * norm_b
        if not bound <= max_norm or excess(name, scale, norm_a, norm_b):  # also when it is NaN
            a, b = (_read(path, start, entries[name, factor]) for factor in ("A", "B"))
            _check_module(name, LoraModule(a, b, scale), max_norm)
        largest = max(largest, bound)
    if not largest > LEAST_NORM:
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            Reason.NORM_OUT_OF_BOUNDS,
            f"{EMPTY} The round learnt nothing: raise its learning rate, or send what a later round learns.",
        )


def _read(path: Path, start: int, entry: Entry) -> Array:
    with storage(path):
        return np.fromfile(path, np.float32, entry.elements, offset=start + entry.begin).reshape(entry.shape)


def _check_module(name: str, module: LoraModule, max_norm: float) -> None:
    norm = increment_norm(module)
    # A value that is not finite makes the norm so (0 * inf is NaN): the values are looked at again only then.
    if not np.isfinite(norm) and not (np.isfinite(module.A).all() and np.isfinite(module.B).all()):
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            Reason.NOT_FINITE,
            f"Module {name!r} has NaN or infinite values; expected finite numbers.",
        )
    if text := excess(name, module.scale, frobenius(module.A), frobenius(module.B)):
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            Reason.NORM_OUT_OF_BOUNDS,
            f"{text} Train with a smaller learning rate or lora_alpha.",
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
