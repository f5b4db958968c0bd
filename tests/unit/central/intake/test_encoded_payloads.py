"""Payloads in bf16 and int8: what is admitted, what is refused, and that a merge can read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from central.errors import Reason, Refused
from central.intake import values
from central.intake.checks import check_payload, header_bytes
from central.intake.values import increment_norm
from protos.encoding import ENCODINGS, Encoding
from protos.lora import LoraModule, LoraTensors, decode, encode
from protos.manifest import Payload, sha256_hex
from tests.unit.central import builders as make
from tests.unit.protos.files import payload_file

OUT, IN = 70, 90


def make_module(seed: int = 0, rank: int = 4) -> LoraModule:
    random = np.random.default_rng(seed)
    return LoraModule(
        random.standard_normal((rank, IN)).astype(np.float32),
        random.standard_normal((OUT, rank)).astype(np.float32),
        0.5,
    )


TENSORS = LoraTensors({"m": make_module()})


def check(
    folder: Path, data: bytes, encoding: Encoding, max_norm: float = 1e3, rank: int = 4
) -> None:
    path = folder / "payload"
    path.write_bytes(data)
    payload = Payload(digest_sha256=sha256_hex(data), size_bytes=len(data))
    update = make.make_update(make.make_release(), payload=payload, encoding=encoding, rank=rank)
    check_payload(path, update, {"m": (OUT, IN)}, max_norm)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("slice_values", [64, 128, 1 << 16])
def test_the_norm_is_that_of_what_a_merge_reads(
    tmp_path: Path, encoding: Encoding, slice_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "SLICE_VALUES", slice_values)
    data = encode(TENSORS, encoding)
    norm = increment_norm(decode(data).modules["m"])
    check(tmp_path, data, encoding, norm)  # the norms of its factors do not admit it
    with pytest.raises(Refused) as caught:
        check(tmp_path, data, encoding, norm * 0.999)
    assert caught.value.reason is Reason.NORM_OUT_OF_BOUNDS


@pytest.mark.parametrize("sent", ENCODINGS)
@pytest.mark.parametrize("said", ENCODINGS)
def test_the_payload_has_the_encoding_that_the_manifest_states(
    tmp_path: Path, sent: Encoding, said: Encoding
) -> None:
    if sent == said:
        check(tmp_path, encode(TENSORS, sent), said)
        return
    with pytest.raises(Refused, match=f"expected {said} .*, as the manifest says") as caught:
        check(tmp_path, encode(TENSORS, sent), said)
    assert caught.value.reason is Reason.BAD_DTYPE


def int8_file(**changed: Any) -> bytes:
    """An int8 payload with some tensors changed or left out (None)."""
    parts: dict[str, Any] = {
        "lora/m/A": ("I8", [1, IN], bytes([1] * IN)),
        "lora/m/A_scales": ("F32", [2], np.ones(2, np.float32).tobytes()),
        "lora/m/B": ("I8", [OUT, 1], bytes([1] * OUT)),
        "lora/m/B_scales": ("F32", [2], np.ones(2, np.float32).tobytes()),
    } | {f"lora/m/{name}": part for name, part in changed.items()}
    return payload_file({name: part for name, part in parts.items() if part}, {"m": 1.0})


def scales(*numbers: float) -> tuple[str, list[int], bytes]:
    return "F32", [len(numbers)], np.array(numbers, np.float32).tobytes()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"A_scales": None}, Reason.BAD_SHAPE),
        ({"A_scales": scales(1)}, Reason.BAD_SHAPE),
        ({"B_scales": scales(1, 1, 1)}, Reason.BAD_SHAPE),
        ({"B_scales": ("F64", [2], bytes(16))}, Reason.BAD_SHAPE),
        ({"B_scales": ("F32", [2, 1], bytes(8))}, Reason.BAD_SHAPE),
        ({"B_scales": scales(1, np.nan)}, Reason.NOT_FINITE),
        ({"A_scales": scales(np.inf, 1)}, Reason.NOT_FINITE),
        ({"A_scales": scales(3e38, 1), "A": ("I8", [1, IN], bytes([9] * IN))}, Reason.NOT_FINITE),
        ({"A_scales": scales(1e20, 1)}, Reason.NORM_OUT_OF_BOUNDS),
        ({"A_scales": scales(0, 0)}, Reason.NORM_OUT_OF_BOUNDS),
        ({"C_scales": scales(1)}, Reason.MALFORMED_PAYLOAD),
        ({"A": ("F32", [1, IN], bytes(4 * IN))}, Reason.MALFORMED_PAYLOAD),
    ],
)
def test_int8_with_bad_scales_is_refused(
    tmp_path: Path, changed: dict[str, Any], reason: Reason
) -> None:
    check(tmp_path, int8_file(), "int8", rank=1)
    with pytest.raises(Refused) as caught:
        check(tmp_path, int8_file(**changed), "int8", rank=1)
    assert caught.value.reason is reason, str(caught.value)


def test_nan_in_bf16_is_refused(tmp_path: Path) -> None:
    data = bytearray(encode(TENSORS, "bf16"))
    data[-2:] = b"\xc0\x7f"
    with pytest.raises(Refused) as caught:
        check(tmp_path, bytes(data), "bf16")
    assert caught.value.reason is Reason.NOT_FINITE


def test_the_header_of_int8_is_not_too_long_for_any_base(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in range(200)]
    module = LoraModule(np.ones((64, 1), np.float32), np.ones((1, 64), np.float32))
    data = encode(LoraTensors(dict.fromkeys(names, module)), "int8")
    assert int.from_bytes(data[:8], "little") <= header_bytes(names)
