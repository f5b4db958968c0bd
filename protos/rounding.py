"""float32 <-> bf16, and int8 in blocks of 64.

In: float32 arrays. Out: what is stored, and float32 again. bf16 is the upper half of a float32,
rounded to nearest, ties to even: a relative error of 2^-8 at most. int8 stores each BLOCK values in
a row as integers from -127 to 127 times one float32 scale, the largest magnitude over 127: an error
of half a scale at most. Guarantee: only elementwise IEEE operations of numpy and no sum, so the
same input gives the same bytes, and the same bytes the same float32, on every machine.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
BLOCK = 64
"""Values of an array, in row-major order, that share a scale; the last block may be shorter."""
LARGEST_VALUE = 1e38
"""Largest magnitude that bf16 and int8 take here; rounding one of 3.4e38 up makes infinity."""
_LARGEST = 127


def block_count(values: int) -> int:
    """How many scales so many values have."""
    return -(-values // BLOCK)


def to_bf16(values: Array) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16 of each value, ties to even; values must be finite."""
    bits = np.asarray(values, np.float32, order="C").view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> Array:
    """The float32 of each bfloat16, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_int8(values: Array) -> tuple[npt.NDArray[np.int8], Array]:
    """Integers of the same shape, and float32 scales [block_count]; values must be finite."""
    blocks = np.zeros((block_count(values.size), BLOCK), np.float32)
    blocks.ravel()[: values.size] = values.ravel()
    scales = np.abs(blocks).max(axis=1) / np.float32(_LARGEST)
    steps = np.divide(blocks, scales[:, None], out=np.zeros_like(blocks), where=scales[:, None] > 0)
    integers = np.clip(np.rint(steps), -_LARGEST, _LARGEST).astype(np.int8)
    return integers.ravel()[: values.size].reshape(values.shape), scales


def from_int8(integers: npt.NDArray[np.int8], scales: Array) -> Array:
    """float32 of the integers' shape; scales float32 [block_count], of any value."""
    with np.errstate(over="ignore", invalid="ignore"):
        flat = integers.ravel().astype(np.float32) * np.repeat(scales, BLOCK)[: integers.size]
    return flat.reshape(integers.shape)


def product_square(A: Array, B: Array) -> float:
    """||B @ A||_F^2 from the rank x rank Grams in float64, never from the dense product.

    A [rank, in], B [out, rank].
    """
    a, b = A.astype(np.float64), B.astype(np.float64)
    return max(0.0, float(np.sum((b.T @ b) * (a @ a.T))))
