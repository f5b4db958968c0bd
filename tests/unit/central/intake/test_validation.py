"""Payload checks that need no server."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from central.errors import Reason, Refused
from central.intake.validation import MAX_HEADER_BYTES, check_payload, increment_norm
from central.settings import LimitSettings
from protos.lora import LoraModule, LoraTensors, encode
from tests.unit.central import builders as make

SHAPES = {"m": (6, 5)}


def make_module(seed: int = 0, rank: int = 4, scale: float = 0.5) -> LoraModule:
    random = np.random.default_rng(seed)
    return LoraModule(
        random.standard_normal((rank, 5)).astype(np.float32),
        random.standard_normal((6, rank)).astype(np.float32),
        scale,
    )


def check(data: bytes) -> None:
    check_payload(data, make.make_update(make.make_release()), SHAPES, LimitSettings())


def test_the_norm_is_that_of_the_dense_increment() -> None:
    module = make_module(scale=-0.5)
    dense = -0.5 * module.B.astype(np.float64) @ module.A.astype(np.float64)
    assert increment_norm(module) == pytest.approx(np.linalg.norm(dense))


def test_a_good_payload_passes() -> None:
    check(encode(LoraTensors({"m": make_module()})))


def test_a_smaller_rank_than_the_manifest_says_is_refused() -> None:
    with pytest.raises(Refused, match="the manifest says 4") as caught:
        check(encode(LoraTensors({"m": make_module(rank=2)})))
    assert caught.value.reason is Reason.BAD_SHAPE


def test_a_huge_header_is_refused_before_it_is_parsed() -> None:
    size = MAX_HEADER_BYTES + 1
    with pytest.raises(Refused, match=f"header has {size} bytes"):
        check(size.to_bytes(8, "little") + b" " * size)


def test_no_factors_at_all_are_refused() -> None:
    with pytest.raises(Refused, match="at least one module"):
        check(encode(LoraTensors()))


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 400), replacement=st.binary(max_size=12))
def test_damaged_bytes_are_refused_or_still_valid_but_never_crash(position: int, replacement: bytes) -> None:
    good = encode(LoraTensors({"m": make_module()}))
    data = good[:position] + replacement + good[position + len(replacement) :]
    # Anything but Refused (or nothing) fails the test: a crash would be central's, not the node's.
    with contextlib.suppress(Refused):
        check(data)
