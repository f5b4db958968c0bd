"""The LoRA codec: fixed bytes, exact round trips, and one kind of error for whatever comes in."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.lora import LoraCodecError, LoraModule, LoraTensors, decode, encode
from protos.manifest import sha256_hex

GOLDEN = "52053227619aae1d66de10b4ed16e1a549579e8e52e6aa4e1419c03e79f4ccdd"
GENESIS = "f61917f28a2a858a488c2cd6d1e235e0d425fc512a5d560c06e700c0b9d87ad2"


def make_tensors() -> LoraTensors:
    """Two modules of different rank, one section; every value is exact in float32."""
    q = LoraModule(
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(8, dtype=np.float32).reshape(4, 2),
        2.0,
    )
    up = LoraModule(np.full((1, 4), 0.5, np.float32), np.full((3, 1), -0.25, np.float32), 1.5)
    return LoraTensors(
        {"model.layers.0.self_attn.q_proj": q, "model.layers.0.mlp.up_proj": up},
        {"statistics": {"count": np.array([7, 9], np.int64), "scale": np.array(0.5, np.float64)}},
    )


def make_file(tensors: dict[str, tuple[str, list[int], bytes]], document: Any) -> bytes:
    """A safetensors file from its parts, valid or not: name -> dtype, shape, content."""
    header: dict[str, Any] = {
        "__metadata__": {
            "lorikeet": document if isinstance(document, str) else json.dumps(document)
        }
    }
    body = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(body), len(body) + len(content)],
        }
        body += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def assert_equal(left: LoraTensors, right: LoraTensors) -> None:
    assert left.modules.keys() == right.modules.keys()
    for name, module in left.modules.items():
        assert module.scale == right.modules[name].scale
        np.testing.assert_array_equal(module.A, right.modules[name].A)
        np.testing.assert_array_equal(module.B, right.modules[name].B)
    assert {s: set(keys) for s, keys in left.sections.items()} == {
        s: set(keys) for s, keys in right.sections.items()
    }
    for section, keys in left.sections.items():
        for key, array in keys.items():
            other = right.sections[section][key]
            assert (array.dtype, array.shape) == (other.dtype, other.shape)
            np.testing.assert_array_equal(array, other)


def test_golden_bytes() -> None:
    assert sha256_hex(encode(make_tensors())) == GOLDEN
    assert sha256_hex(encode(LoraTensors())) == GENESIS


def test_the_order_of_the_input_does_not_matter() -> None:
    tensors = make_tensors()
    reversed_ = LoraTensors(
        dict(reversed(tensors.modules.items())),
        {"statistics": dict(reversed(tensors.sections["statistics"].items()))},
    )
    assert encode(reversed_) == encode(tensors)
    transposed = LoraTensors(
        {"m": LoraModule(np.ones((3, 2), np.float32).T, np.ones((4, 2), np.float32))}
    )
    assert encode(transposed) == encode(
        LoraTensors({"m": LoraModule(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32))})
    )


def test_layout_is_safetensors_with_one_metadata_entry() -> None:
    data = encode(make_tensors())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.pop("__metadata__") == {
        "lorikeet": '{"format":1,"scales":{"model.layers.0.mlp.up_proj":1.5,'
        '"model.layers.0.self_attn.q_proj":2.0}}'
    }
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "lora/model.layers.0.mlp.up_proj/A": ("F32", [1, 4]),
        "lora/model.layers.0.mlp.up_proj/B": ("F32", [3, 1]),
        "lora/model.layers.0.self_attn.q_proj/A": ("F32", [2, 3]),
        "lora/model.layers.0.self_attn.q_proj/B": ("F32", [4, 2]),
        "section/statistics/count": ("I64", [2]),
        "section/statistics/scale": ("F64", []),
    }


def test_round_trip_and_ranks() -> None:
    tensors = make_tensors()
    assert_equal(decode(encode(tensors)), tensors)
    assert tensors.rank == 2
    assert LoraTensors().rank == 0
    assert_equal(decode(encode(LoraTensors())), LoraTensors())


names = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=12)


@st.composite
def modules(draw: st.DrawFn) -> LoraModule:
    rank, out, in_ = (draw(st.integers(1, 4)) for _ in range(3))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    scale = draw(st.floats(allow_nan=False, allow_infinity=False))
    return LoraModule(
        rng.normal(size=(rank, in_)).astype(np.float32),
        rng.normal(size=(out, rank)).astype(np.float32),
        scale,
    )


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(names, modules(), max_size=3),
    st.dictionaries(
        names, st.dictionaries(names, st.just(np.arange(3)), min_size=1, max_size=2), max_size=2
    ),
)
def test_any_tensors_come_back_exactly(
    named: dict[str, LoraModule], sections: dict[str, dict[str, Any]]
) -> None:
    tensors = LoraTensors(named, sections)
    assert_equal(decode(encode(tensors)), tensors)


def ones(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            LoraTensors({"m": LoraModule(ones(2, 3).astype(np.float16), ones(4, 2))}),
            "dtypes A float16",
        ),  # type: ignore[arg-type]
        (LoraTensors({"m": LoraModule(ones(2, 3), ones(4, 3))}), r"shapes A \(2, 3\), B \(4, 3\)"),
        (LoraTensors({"m": LoraModule(ones(2), ones(4, 2))}), "expected .rank, in."),
        (LoraTensors({"m": LoraModule(ones(0, 3), ones(4, 0))}), "expected .rank, in."),
        (LoraTensors({"m": LoraModule(ones(2, 0), ones(4, 2))}), "expected .rank, in."),
        (
            LoraTensors({"m": LoraModule(ones(2, 3), ones(4, 2), float("nan"))}),
            "scale nan; expected a finite number",
        ),
        (LoraTensors({"": LoraModule(ones(2, 3), ones(4, 2))}), "empty name"),
        (LoraTensors({}, {"statistics": {"a/b": ones(1)}}), "no '/' in the key"),
        (LoraTensors({}, {"": {"a": ones(1)}}), "non-empty names"),
        (LoraTensors({}, {"statistics": {"a": np.array([object()])}}), "cannot be written"),
    ],
)
def test_encode_refuses_what_decode_would_not_take(tensors: LoraTensors, said: str) -> None:
    with pytest.raises(LoraCodecError, match=said):
        encode(tensors)


A, B = ("F32", [1, 1], bytes(4)), ("F32", [1, 1], bytes(4))
ONE = {"format": 1, "scales": {"m": 1.0}}
NONE: dict[str, Any] = {"format": 1, "scales": {}}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no readable header"),
        (b"\x80\x04N.", "no readable header"),  # a pickle
        (struct.pack("<Q", 2**63) + b"{}", "no readable header"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "no readable header"),
        (make_file({}, "[" * 100_000), "no readable header"),
        (make_file({}, [1]), "no readable header"),
        (make_file({}, {"format": 2, "scales": {}}), "format 2; this software reads format 1"),
        (make_file({}, {"format": 1}), "no readable header"),
        (make_file({}, '{"format":1,"scales":{"m":' + "9" * 5000 + "}}"), "no readable header"),
        (
            make_file({"lora/m/A": A, "lora/m/B": B}, {"format": 1, "scales": {"m": "1"}}),
            "not a number",
        ),
        (
            make_file({"lora/m/A": A, "lora/m/B": B}, {"format": 1, "scales": {"m": True}}),
            "not a number",
        ),
        (
            make_file({"lora/m/A": A, "lora/m/B": B}, '{"format":1,"scales":{"m":Infinity}}'),
            "expected a finite number",
        ),
        (make_file({"lora/m/A": A, "lora/m/B": B}, NONE), "scale None; expected A, B and a scale"),
        (make_file({"lora/m/A": A}, ONE), r"\['A'\] and scale 1.0; expected A, B and a scale"),
        (make_file({}, ONE), r"Scales without factors: \['m'\]"),
        (make_file({"lora//A": A, "lora//B": B}, NONE), "Unknown tensor 'lora//A'"),
        (make_file({"lora/m/C": A}, NONE), "Unknown tensor 'lora/m/C'"),
        (make_file({"weights": A}, NONE), "Unknown tensor 'weights'"),
        (make_file({"section/a": A}, NONE), "Unknown tensor 'section/a'"),
        (
            make_file({"lora/m/A": ("F64", [1, 1], bytes(8)), "lora/m/B": B}, ONE),
            "dtypes A float64",
        ),
        (
            make_file({"lora/m/A": ("F8_E4M3", [1, 1], bytes(1)), "lora/m/B": B}, ONE),
            "not a readable safetensors file",
        ),
        (
            make_file({"lora/m/A": ("F32", [2, 1], bytes(4)), "lora/m/B": B}, ONE),
            "not a readable safetensors file",
        ),
        (
            make_file({"lora/m/A": ("F32", [2, 1], bytes(8)), "lora/m/B": B}, ONE),
            "expected .rank, in.",
        ),
        (make_file({"lora/m/A": ("F32", [1, 0], b""), "lora/m/B": B}, ONE), "expected .rank, in."),
    ],
)
def test_decode_names_what_is_wrong(data: bytes, said: str) -> None:
    with pytest.raises(LoraCodecError, match=said):
        decode(data)


def test_every_truncation_is_refused() -> None:
    data = encode(make_tensors())
    for size in range(len(data)):
        with pytest.raises(LoraCodecError):
            decode(data[:size])


def decode_or_refuse(data: bytes) -> None:
    try:
        tensors = decode(data)
    except LoraCodecError:
        return
    assert_finite_shapes(tensors)


def assert_finite_shapes(tensors: LoraTensors) -> None:
    for module in tensors.modules.values():
        assert module.A.shape[0] == module.B.shape[1] >= 1
        assert np.isfinite(module.scale)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    decode_or_refuse(data)
    decode_or_refuse(struct.pack("<Q", len(data)) + data)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=6))
def test_flipped_bits_never_raise_anything_else(flips: list[tuple[int, int]]) -> None:
    data = bytearray(encode(make_tensors()))
    for position, mask in flips:
        data[position % len(data)] ^= mask
    decode_or_refuse(bytes(data))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["format", "scales", "m"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(json_values, json_values)
def test_any_json_in_the_header_never_raises_anything_else(document: Any, scales: Any) -> None:
    for value in (
        document,
        {"format": 1, "scales": scales},
        {"format": document, "scales": {"m": scales}},
    ):
        decode_or_refuse(make_file({"lora/m/A": A, "lora/m/B": B}, value))
    text = json.dumps({"__metadata__": document, "x": scales}).encode()
    decode_or_refuse(struct.pack("<Q", len(text)) + text)
