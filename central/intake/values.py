"""The values of a factor in a payload's file, as float32 whatever the encoding.

In: an open file, where its values begin, a factor's place. Out: its norm, or the factor. Values are
read in slices, so memory does not grow with the update.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from io import FileIO
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from protos.lora import LoraModule
from protos.rounding import BLOCK, Array, block_count, from_bf16, from_int8, product_square

FLOAT_BYTES = 4
SLICE_VALUES = 1 << 16
"""Values that are read at once, a multiple of BLOCK: 256 KiB of float32."""
STORED = {"F32": np.float32, "BF16": np.uint16, "I8": np.int8}
"""What the file has of a factor, by its dtype in the header; numpy has no bf16."""


class Entry(NamedTuple):
    """One factor in a payload's header; `begin`, `scales` count bytes from the header's end."""

    dtype: str
    shape: tuple[int, int]
    begin: int
    scales: int = 0
    """Where the scales of an int8 factor begin."""


def norm(file: FileIO, start: int, entry: Entry) -> float:
    """The factor's Frobenius norm, summed in float64; NaN or infinite where a value is."""
    total = 0.0
    for values in _slices(file, start, entry):
        # Not np.dot: BLAS would share it out over threads.
        total += float(np.einsum("i,i->", values, values, dtype=np.float64))
    return math.sqrt(total)


def read(file: FileIO, start: int, entry: Entry) -> Array:
    """The whole factor as float32."""
    return np.concatenate(list(_slices(file, start, entry))).reshape(entry.shape)


def _slices(file: FileIO, start: int, entry: Entry) -> Iterator[Array]:
    """The factor's values as float32 in row-major order, SLICE_VALUES at once."""
    elements, stored = math.prod(entry.shape), np.dtype(STORED[entry.dtype])
    for first in range(0, elements, SLICE_VALUES):
        count = min(SLICE_VALUES, elements - first)
        values = _stored(file, start + entry.begin + first * stored.itemsize, count, stored)
        if entry.dtype == "I8":
            begin = start + entry.scales + first // BLOCK * FLOAT_BYTES
            scales = _stored(file, begin, block_count(count), np.dtype(np.float32))
            yield from_int8(values, scales)
        else:
            yield from_bf16(values) if entry.dtype == "BF16" else values


def _stored(file: FileIO, begin: int, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    values = np.empty(count, dtype)
    file.seek(begin)
    left = values.data.cast("B")
    while left:
        read = file.readinto(left)
        if not read:
            raise OSError(errno.EIO, "the file is shorter than it was")
        left = left[read:]
    return values


def increment_norm(module: LoraModule) -> float:
    """||scale * B @ A||_F, never from the dense product."""
    return abs(module.scale) * math.sqrt(product_square(module.A, module.B))
