"""bf16 and int8: error bounds, ties, and the same bytes on every machine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from protos.encoding import ENCODINGS, Encoding
from protos.lora import LoraCodecError, LoraModule, LoraTensors, decode, encode, relative_error
from protos.rounding import BLOCK, LARGEST_VALUE, Array, from_bf16, from_int8, to_bf16, to_int8
from tests.unit.protos.files import payload_file

matrices = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=80),
    elements=st.floats(-(2.0**126), 2.0**126, width=32),
    fill=st.floats(-1, 1, width=32),
)


@settings(max_examples=60, deadline=None)
@given(matrices)
def test_bf16_is_the_nearest_one(values: Array) -> None:
    bits = to_bf16(values)
    error = np.abs(from_bf16(bits).astype(np.float64) - values)
    for neighbour in (bits - 1, bits + 1):
        other = from_bf16(neighbour.astype(np.uint16)).astype(np.float64)
        assert (error <= np.abs(other - values))[np.isfinite(other)].all()
    # Half of the last of eight bits; below the smallest normal number the step is 2^-133.
    assert (error <= np.maximum(np.abs(values) * 2.0**-8, 2.0**-134)).all()
    np.testing.assert_array_equal(to_bf16(from_bf16(bits)), bits)


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [(0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (0x3F808001, 0x3F81), (0xBF818000, 0xBF82)],
)
def test_bf16_breaks_ties_to_even(bits: int, rounded: int) -> None:
    assert to_bf16(np.array([bits], np.uint32).view(np.float32)) == rounded


@settings(max_examples=60, deadline=None)
@given(matrices)
def test_int8_is_off_by_half_a_scale_at_most(values: Array) -> None:
    integers, scales = to_int8(values)
    assert (integers.shape, scales.shape) == (values.shape, (-(-values.size // BLOCK),))
    error = np.abs(from_int8(integers, scales).astype(np.float64) - values).ravel()
    largest = np.maximum.reduceat(np.abs(values).ravel(), range(0, values.size, BLOCK))
    bound = np.repeat(largest / 254 * (1 + 1e-5), BLOCK)[: values.size]
    assert (error <= np.maximum(bound, 127 * 2.0**-149)).all()  # a scale may have few bits


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_payload_is_read_as_float32_with_the_error_that_is_stated(encoding: Encoding) -> None:
    numbers = np.random.default_rng(0)
    A = numbers.normal(size=(8, 200)).astype(np.float32)
    B = numbers.normal(size=(100, 8)).astype(np.float32)
    meant = LoraTensors({"m": LoraModule(A, B, 2.0), "n": LoraModule(A, 3 * B, -0.5)})
    sent = decode(encode(meant, encoding))
    assert {m.A.dtype for m in sent.modules.values()} == {np.dtype(np.float32)}
    dense = [
        t.modules[n].scale * t.modules[n].B @ t.modules[n].A for n in "mn" for t in (sent, meant)
    ]
    change = np.linalg.norm([dense[0] - dense[1], dense[2] - dense[3]])
    expected = change / np.linalg.norm([dense[1], dense[3]])
    error = relative_error(sent, meant)
    assert error == pytest.approx(expected, rel=0.01, abs=1e-7)
    assert error < {"float32": 1e-9, "bf16": 0.004, "int8": 0.012}[encoding]


def test_bytes_of_a_large_payload() -> None:
    A, B = np.ones((16, 4096), np.float32), np.ones((4096, 16), np.float32)
    sizes = {e: len(encode(LoraTensors({"m": LoraModule(A, B)}), e)) for e in ENCODINGS}
    assert sizes["bf16"] / sizes["float32"] == pytest.approx(1 / 2, abs=0.01)
    assert sizes["int8"] / sizes["float32"] == pytest.approx((1 + 4 / BLOCK) / 4, abs=0.01)


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -2 * LARGEST_VALUE])
def test_what_cannot_be_rounded_is_refused(encoding: Encoding, value: float) -> None:
    A = np.array([[1, value]], np.float32)
    with pytest.raises(LoraCodecError, match=f"'lora/m/A' has values .* {encoding} does not take"):
        encode(LoraTensors({"m": LoraModule(A, np.ones((3, 1), np.float32))}), encoding)


B = ("F32", [1, 1], bytes(4))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora/m/A": ("I8", [1, 1], b"1"), "lora/m/B": B}, "int8 with scales none"),
        (
            {"lora/m/A_scales": B, "lora/m/A": ("I8", [1, 1], b"1"), "lora/m/B": B},
            r"int8 with scales float32 \[1, 1\]; expected float32 \[1\]",
        ),
        (
            {"lora/m/A_scales": ("F32", [1], bytes(4)), "lora/m/A": B, "lora/m/B": B},
            "Unknown tensor 'lora/m/A_scales'",
        ),
        (
            {"section/s/x": ("BF16", [1], bytes(2)), "lora/m/A": B, "lora/m/B": B},
            "not a readable safetensors file",
        ),
    ],
)
def test_decode_names_what_is_wrong(
    tensors: dict[str, tuple[str, list[int], bytes]], said: str
) -> None:
    with pytest.raises(LoraCodecError, match=said):
        decode(payload_file(tensors, {"m": 1.0}))
