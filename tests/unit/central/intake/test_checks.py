"""Payload checks that need no server."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st

from central.errors import Reason, Refused, StorageError
from central.intake import checks, values
from central.intake.checks import Shapes, check_payload, header_bytes, manifest_bytes
from central.intake.values import increment_norm
from protos.lora import LoraModule, LoraTensors, decode, encode
from protos.manifest import Payload, sha256_hex
from tests.unit.central import builders as make

SHAPES = {"m": (6, 5)}
INVALID_ARGUMENT = StatusCode.INVALID_ARGUMENT


def make_module(seed: int = 0, rank: int = 4, scale: float = 0.5) -> LoraModule:
    random = np.random.default_rng(seed)
    return LoraModule(
        random.standard_normal((rank, 5)).astype(np.float32),
        random.standard_normal((6, rank)).astype(np.float32),
        scale,
    )


def check(data: bytes, max_norm: float = 1e3, shapes: Shapes = SHAPES, **fields: object) -> None:
    """As a complete upload is checked."""
    payload = Payload(digest_sha256=sha256_hex(data), size_bytes=max(1, len(data)))
    update = make.make_update(make.make_release(), payload=payload, **fields)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "payload"
        path.write_bytes(data)
        check_payload(path, update, shapes, max_norm)


def test_the_norm_is_that_of_the_dense_increment() -> None:
    module = make_module(scale=-0.5)
    dense = -0.5 * module.B.astype(np.float64) @ module.A.astype(np.float64)
    assert increment_norm(module) == pytest.approx(np.linalg.norm(dense))


def test_a_good_payload_passes() -> None:
    check(encode(LoraTensors({"m": make_module()})))


@pytest.mark.parametrize("slice_values", [1, 7, 20, 1 << 16])
@pytest.mark.parametrize("position", [None, 0, 6, 7, 19, 20, 43])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_value_is_found_in_every_slice(
    slice_values: int, position: int | None, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "SLICE_VALUES", slice_values)
    module = make_module()
    numbers = np.concatenate([module.A.ravel(), module.B.ravel()])
    if position is not None:
        numbers[position] = value
    module = LoraModule(numbers[:20].reshape(4, 5), numbers[20:].reshape(6, 4), 0.5)
    with contextlib.nullcontext() if position is None else pytest.raises(Refused) as caught:
        check(encode(LoraTensors({"m": module})))
    assert position is None or caught.value.reason is Reason.NOT_FINITE


def test_memory_does_not_grow_with_the_update(tmp_path: Path) -> None:
    module = LoraModule(np.full((4, 1 << 20), 1e-3, np.float32), np.ones((6, 4), np.float32), 0.5)
    path = tmp_path / "payload"
    path.write_bytes(encode(LoraTensors({"m": module})))
    update = make.make_update(make.make_release())
    tracemalloc.start()
    try:
        check_payload(path, update, {"m": (6, 1 << 20)}, 1e3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20 < path.stat().st_size / 16


def test_the_exact_norm_decides_where_the_bound_does_not_tell() -> None:
    module = make_module()
    norm = increment_norm(module)
    data = encode(LoraTensors({"m": module}))
    # Far below the product of the factors' norms, so only the exact norm can admit it.
    for bound in (norm * 1.0001, norm):
        check(data, bound)
    with pytest.raises(Refused) as caught:
        check(data, norm * 0.9999)
    assert caught.value.reason is Reason.NORM_OUT_OF_BOUNDS


def test_the_exact_norm_is_not_computed_where_the_bound_tells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "increment_norm", lambda _: pytest.fail("was computed"))
    check(encode(LoraTensors({"m": make_module()})))


def test_values_whose_squares_vanish_in_float32_do_not_slip_through() -> None:
    small = np.full((1, 5), 1e-23, np.float32)
    module = LoraModule(small, np.full((6, 1), 1e3, np.float32), 1e4)
    with pytest.raises(Refused) as caught:
        check(encode(LoraTensors({"m": module})), increment_norm(module) / 2, rank=1)
    assert caught.value.reason is Reason.NORM_OUT_OF_BOUNDS


def test_a_file_that_is_gone_is_no_fault_of_the_node(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="payload"):
        check_payload(tmp_path / "payload", make.make_update(make.make_release()), SHAPES, 1e3)


def test_a_payload_that_ends_within_its_header_is_refused() -> None:
    data = encode(LoraTensors({"m": make_module()}))
    for size in (3, 8, 100):
        with pytest.raises(Refused, match=f"ends within its header, after {size} bytes"):
            check(data[:size])


@pytest.mark.parametrize(("padding", "message"), [(1, "multiple of 8"), (4, "")])
def test_values_that_lie_across_the_borders_of_floats_are_refused(
    padding: int, message: str
) -> None:
    data = encode(LoraTensors({"m": make_module()}))
    size = int.from_bytes(data[:8], "little")
    moved = (
        (size + padding).to_bytes(8, "little")
        + data[8 : 8 + size]
        + b" " * padding
        + data[8 + size :]
    )
    with pytest.raises(Refused, match=message) if message else contextlib.nullcontext():
        check(moved)


def test_a_smaller_rank_than_the_manifest_says_is_refused() -> None:
    with pytest.raises(Refused, match="the manifest says 4") as caught:
        check(encode(LoraTensors({"m": make_module(rank=2)})))
    assert caught.value.reason is Reason.BAD_SHAPE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("other", [0.0, 1.0])
def test_a_value_that_is_not_finite_is_refused_even_beside_zeros(
    value: float, factor: str, other: float
) -> None:
    arrays = {"A": np.full((4, 5), other, np.float32), "B": np.full((6, 4), other, np.float32)}
    arrays[factor][1, 1] = value
    with pytest.raises(Refused) as caught:
        check(encode(LoraTensors({"m": LoraModule(**arrays)})))
    assert caught.value.reason is Reason.NOT_FINITE


def test_the_largest_finite_values_are_out_of_bounds_and_not_non_finite() -> None:
    largest = np.finfo(np.float32).max
    with pytest.raises(Refused) as caught:
        check(
            encode(
                LoraTensors({"m": LoraModule(np.full((4, 5), largest), np.full((6, 4), largest))})
            )
        )
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


def with_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A payload whose header was changed."""
    data = encode(LoraTensors({"m": make_module()}))
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    changed = change(header)
    text = json.dumps(header if changed is None else changed).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def scales_are(scales: str) -> Callable[[dict[str, Any]], object]:
    text = f'{{"format":1,"scales":{scales}}}'
    return lambda header: header["__metadata__"].update(lorikeet=text)


@pytest.mark.parametrize(
    ("change", "reason", "text"),
    [
        (lambda _: [], Reason.MALFORMED_PAYLOAD, "its header is a list"),
        (lambda _: {"lora/m/A": 1}, Reason.MALFORMED_PAYLOAD, "not a readable safetensors file"),
        (
            lambda header: header["lora/m/A"].update(data_offsets=[]),
            Reason.MALFORMED_PAYLOAD,
            "not a readable safetensors file",
        ),
        (
            lambda header: header["lora/m/A"].update(data_offsets=[4, 84]),
            Reason.MALFORMED_PAYLOAD,
            "not a LoRA safetensors file",
        ),
        (
            lambda header: header["lora/m/A"].update(shape=[20]),
            Reason.BAD_SHAPE,
            "has A of shape [20]; expected two dimensions",
        ),
        (
            lambda header: header["lora/m/A"].update(shape="\ud800"),  # gRPC could not send it
            Reason.BAD_SHAPE,
            r"has A of shape '\ud800'; expected two dimensions",
        ),
        (
            lambda header: header["lora/m/A"].update(shape=[5, 4]),
            Reason.MALFORMED_PAYLOAD,
            "expected [rank, in]",
        ),
        (
            lambda header: header["lora/m/B"].update(shape=[4, 6]),
            Reason.MALFORMED_PAYLOAD,
            "expected [rank, in]",
        ),
        (
            lambda header: header["lora/m/B"].update(dtype="I32"),
            Reason.BAD_DTYPE,
            "'m' has B in I32; expected float32 (F32), as the manifest says",
        ),
        (scales_are("{}"), Reason.MALFORMED_PAYLOAD, "expected A, B and a scale"),
        (scales_are('{"m":"1"}'), Reason.MALFORMED_PAYLOAD, "a scale that is not a number"),
        (scales_are('{"m":1e999}'), Reason.MALFORMED_PAYLOAD, "expected a finite number"),
        (scales_are('{"m":1,"n":1}'), Reason.MALFORMED_PAYLOAD, "Scales without factors"),
        (
            lambda header: header.pop("__metadata__") and None,
            Reason.MALFORMED_PAYLOAD,
            "no readable header with a 'lorikeet' entry",
        ),
    ],
)
def test_a_header_that_lies_is_refused(
    change: Callable[[dict[str, Any]], object], reason: Reason, text: str
) -> None:
    with pytest.raises(Refused) as caught:
        check(with_header(change))
    assert caught.value.reason is reason
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("module", "shapes", "reason", "text"),
    [
        ("n", SHAPES, Reason.UNKNOWN_MODULE, "'n' is not one .* for example 'm'"),
        ("m", {"m": (6, 4)}, Reason.BAD_SHAPE, r"A of shape \(4, 5\); expected \[rank, 4\]"),
        ("m", {"m": (7, 5)}, Reason.BAD_SHAPE, r"B of shape \(6, 4\); expected \[7, rank\]"),
    ],
)
def test_factors_that_do_not_fit_the_base_are_refused(
    module: str, shapes: dict[str, tuple[int, int]], reason: Reason, text: str
) -> None:
    with pytest.raises(Refused, match=text) as caught:
        check(encode(LoraTensors({module: make_module()})), shapes=shapes)
    assert (caught.value.reason, caught.value.status) == (reason, INVALID_ARGUMENT)


def test_a_module_of_larger_rank_than_the_manifest_says_is_refused() -> None:
    with pytest.raises(Refused, match="rank 4; the manifest says at most 3") as caught:
        check(encode(LoraTensors({"m": make_module()})), rank=3)
    assert caught.value.reason is Reason.RANK_TOO_LARGE


SECTIONED = LoraTensors({"m": make_module()}, {"statistics": {"U": np.ones((5, 2), np.float32)}})


def test_sections_that_the_manifest_does_not_name_are_refused() -> None:
    with pytest.raises(
        Refused, match=r"Sections are \['statistics'\]; the manifest says \[\]"
    ) as caught:
        check(encode(SECTIONED))
    assert caught.value.reason is Reason.UNKNOWN_SECTION


def test_tensors_of_a_section_are_no_factors() -> None:
    for name in ("A", "U"):
        section = {"statistics": {name: np.ones((5, 2), np.float32)}}
        data = encode(LoraTensors({"m": make_module()}, section))
        check(data, sections=["statistics"])


def test_an_increment_of_small_factors_has_a_small_norm() -> None:
    small = np.full((1, 5), 1e-3, np.float32), np.full((6, 1), 1e-3, np.float32)
    assert increment_norm(LoraModule(*small)) == pytest.approx(1e-6 * math.sqrt(30))


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 400), replacement=st.binary(max_size=12))
def test_damaged_bytes_are_refused_or_still_valid_but_never_crash(
    position: int, replacement: bytes
) -> None:
    good = encode(LoraTensors({"m": make_module()}))
    data = good[:position] + replacement + good[position + len(replacement) :]
    # Anything but Refused (or nothing) fails the test: a crash would be central's, not the node's.
    with contextlib.suppress(Refused):
        check(data)


MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in range(32)
    for name in ("self_attn.q_proj", "mlp.down_proj")
]


def test_a_header_with_every_module_and_section_fits() -> None:
    a, b = np.zeros((64, 4), np.float32), np.zeros((4, 64), np.float32)
    modules = {name: LoraModule(a, b, 0.12345678901234567) for name in MODULES}
    sections = {f"gram/{name}": {"U": b, "c": np.zeros((), np.float32)} for name in MODULES}
    data = encode(LoraTensors(modules, sections))
    size = int.from_bytes(data[:8], "little")
    # A payload of 512 MiB has offsets of nine digits, not six: six more for each of five entries.
    assert size + 6 * 5 * len(MODULES) < header_bytes(MODULES) < 2 * size


def test_a_manifest_with_every_section_fits() -> None:
    metrics = {f"metric/{number}": 0.12345678901234567 for number in range(64)}
    sections = sorted(f"gram/{name}" for name in MODULES)
    update = make.make_update(make.make_release(), metrics=metrics, sections=sections)
    assert len(update.to_bytes()) < manifest_bytes(MODULES) < 4 * len(update.to_bytes())


def test_bounds_are_small_for_a_small_base() -> None:
    assert header_bytes(MODULES[:2]) < 8 << 10
    assert manifest_bytes(MODULES[:2]) < 9 << 10
