"""Payload checks that need no server."""

from __future__ import annotations

import contextlib
import gc
import json
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from central.errors import Reason, Refused
from central.intake.bounds import header_bytes
from central.intake.validation import KNOWN_HEADER_BYTES, PayloadCheck
from central.intake.values import increment_norm
from central.settings import LimitSettings
from protos.lora import LoraModule, LoraTensors, decode, encode
from protos.manifest import Payload, sha256_hex
from tests.unit.central import builders as make

SHAPES = {"m": (6, 5)}


def make_module(seed: int = 0, rank: int = 4, scale: float = 0.5) -> LoraModule:
    random = np.random.default_rng(seed)
    return LoraModule(
        random.standard_normal((rank, 5)).astype(np.float32),
        random.standard_normal((6, rank)).astype(np.float32),
        scale,
    )


def check(data: bytes, window: int = 64, limits: LimitSettings | None = None, **fields: object) -> None:
    """As an upload is checked: it comes in windows, and at the end lies in a file."""
    payload = Payload(digest_sha256=sha256_hex(data), size_bytes=max(1, len(data)))
    update = make.make_update(make.make_release(), payload=payload, **fields)
    found = PayloadCheck(update, SHAPES, limits or LimitSettings())
    for begin in range(0, len(data), window):
        found.feed(memoryview(data[begin : begin + window]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "payload"
        path.write_bytes(data)
        found.finish(path)


def test_the_norm_is_that_of_the_dense_increment() -> None:
    module = make_module(scale=-0.5)
    dense = -0.5 * module.B.astype(np.float64) @ module.A.astype(np.float64)
    assert increment_norm(module) == pytest.approx(np.linalg.norm(dense))


def test_a_good_payload_passes() -> None:
    check(encode(LoraTensors({"m": make_module()})))


@settings(max_examples=60, deadline=None)
@given(window=st.integers(1, 300).map(lambda count: 4 * count), bad=st.none() | st.integers(0, 43))
def test_the_windows_in_which_it_comes_change_nothing(window: int, bad: int | None) -> None:
    module = make_module()
    values = np.concatenate([module.A.ravel(), module.B.ravel()])
    if bad is not None:
        values[bad] = np.nan
    module = LoraModule(values[:20].reshape(4, 5), values[20:].reshape(6, 4), 0.5)
    with contextlib.nullcontext() if bad is None else pytest.raises(Refused, match="NaN"):
        check(encode(LoraTensors({"m": module})), window)


@pytest.mark.parametrize("what", ["unknown modules", "metadata"])
def test_a_stream_keeps_nothing_of_a_large_header_that_it_needs_no_more(what: str) -> None:
    """Every open stream may have one."""
    modules = {"m": make_module()} | ({f"n{i}": make_module() for i in range(3000)} if what != "metadata" else {})
    data = encode(LoraTensors(modules))
    size = int.from_bytes(data[:8], "little")
    if what == "metadata":
        more = json.loads(data[8 : 8 + size])
        more["__metadata__"]["more"] = "a" * 1_000_001
        text = json.dumps(more).encode()
        text += b" " * (-len(text) % 8)
        data = len(text).to_bytes(8, "little") + text + data[8 + size :]
        size = len(text)
    assert size > KNOWN_HEADER_BYTES
    payload = Payload(digest_sha256=sha256_hex(data), size_bytes=len(data))
    found = PayloadCheck(make.make_update(make.make_release(), payload=payload), SHAPES, LimitSettings())
    tracemalloc.start()
    try:
        found.feed(memoryview(data))
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < size / 10


def test_a_payload_that_ends_within_its_header_is_refused() -> None:
    data = encode(LoraTensors({"m": make_module()}))
    for size in (3, 8, 100):
        with pytest.raises(Refused, match=f"ends within its header, after {size} bytes"):
            check(data[:size])


@pytest.mark.parametrize(("padding", "message"), [(1, "multiple of 8"), (4, "")])
def test_values_that_lie_across_the_borders_of_floats_are_refused(padding: int, message: str) -> None:
    data = encode(LoraTensors({"m": make_module()}))
    size = int.from_bytes(data[:8], "little")
    moved = (size + padding).to_bytes(8, "little") + data[8 : 8 + size] + b" " * padding + data[8 + size :]
    with pytest.raises(Refused, match=message) if message else contextlib.nullcontext():
        check(moved)


def test_a_smaller_rank_than_the_manifest_says_is_refused() -> None:
    with pytest.raises(Refused, match="the manifest says 4") as caught:
        check(encode(LoraTensors({"m": make_module(rank=2)})))
    assert caught.value.reason is Reason.BAD_SHAPE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("other", [0.0, 1.0])
def test_a_value_that_is_not_finite_is_refused_even_beside_zeros(value: float, factor: str, other: float) -> None:
    arrays = {"A": np.full((4, 5), other, np.float32), "B": np.full((6, 4), other, np.float32)}
    arrays[factor][1, 1] = value
    with pytest.raises(Refused) as caught:
        check(encode(LoraTensors({"m": LoraModule(**arrays)})))
    assert caught.value.reason is Reason.NOT_FINITE


def test_the_largest_finite_values_are_out_of_bounds_and_not_non_finite() -> None:
    largest = np.finfo(np.float32).max
    with pytest.raises(Refused) as caught:
        check(encode(LoraTensors({"m": LoraModule(np.full((4, 5), largest), np.full((6, 4), largest))})))
    assert caught.value.reason is Reason.NORM_OUT_OF_BOUNDS


def test_a_payload_longer_than_its_header_says_is_refused() -> None:
    with pytest.raises(Refused) as caught:
        check(encode(LoraTensors({"m": make_module()})) + b"more")
    assert caught.value.reason is Reason.MALFORMED_PAYLOAD


def test_what_is_admitted_can_be_decoded() -> None:
    """Whatever passes the check that streams passes the codec of the merge."""
    good = encode(LoraTensors({"m": make_module()}))
    for position in range(0, 300):
        for byte in b'0"{x':
            data = good[:position] + bytes([byte]) + good[position + 1 :]
            with contextlib.suppress(Refused):
                check(data)
                decode(data)


def test_a_huge_header_is_refused_before_it_is_parsed() -> None:
    size = header_bytes(SHAPES) + 1
    with pytest.raises(Refused, match=f"header has {size} bytes"):
        check(size.to_bytes(8, "little") + b" " * size)


def test_no_factors_at_all_are_refused() -> None:
    with pytest.raises(Refused, match="at least one module"):
        check(encode(LoraTensors()))


SECTIONED = LoraTensors({"m": make_module()}, {"statistics": {"U": np.ones((5, 2), np.float32)}})


def test_sections_that_the_manifest_does_not_name_are_refused() -> None:
    with pytest.raises(Refused, match=r"Sections are \['statistics'\]; the manifest says \[\]") as caught:
        check(encode(SECTIONED))
    assert caught.value.reason is Reason.UNKNOWN_SECTION


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 400), replacement=st.binary(max_size=12))
def test_damaged_bytes_are_refused_or_still_valid_but_never_crash(position: int, replacement: bytes) -> None:
    good = encode(LoraTensors({"m": make_module()}))
    data = good[:position] + replacement + good[position + len(replacement) :]
    # Anything but Refused (or nothing) fails the test: a crash would be central's, not the node's.
    with contextlib.suppress(Refused):
        check(data)
