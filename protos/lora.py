"""The LoRA codec: factors and named sections <-> one safetensors file, the same on both sides.

In: `LoraTensors`. Out: safetensors bytes (never pickle), and back. Layout of the file: tensors
`lora/<module>/A` [rank, in_features] and `lora/<module>/B` [out_features, rank] in float32, bf16 or
int8, with `lora/<module>/A_scales` and `B_scales` float32 [blocks] beside int8 (rounding.py);
`section/<name>/<key>` of any dtype; one metadata entry `lorikeet` with canonical JSON
`{"format":1,"scales":{module: scale}}`. What is decoded is float32 always. The increment of a
module is `dW = scale * B @ A` (LoRA, arXiv:2106.09685, section 4.1; scale = alpha/r, or
alpha/sqrt(r) for rsLoRA, 2312.03732). The same input gives the same bytes on every machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from protos.encoding import Encoding
from protos.manifest import canonical_json
from protos.rounding import (
    LARGEST_VALUE,
    Array,
    block_count,
    from_bf16,
    from_int8,
    product_square,
    to_bf16,
    to_int8,
)

METADATA_KEY = "lorikeet"
_DTYPES = {"BOOL": np.dtype(bool), "C64": np.dtype("<c8")} | {
    f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}")
    for kind, sizes in (("F", (2, 4, 8)), ("I", (1, 2, 4, 8)), ("U", (1, 2, 4, 8)))
    for size in sizes
}
"""numpy's types by their names in a header; it has none for bf16."""
_UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
)
"""What a header that somebody made up can raise."""


class LoraCodecError(ValueError):
    """The bytes are not a LoRA payload; the message names the tensor and what was expected."""


@dataclass(frozen=True)
class LoraModule:
    """One module's factors; its increment is dW = scale * B @ A.

    `A` float32 [rank, in_features], `B` float32 [out_features, rank].
    """

    A: Array
    B: Array
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])


@dataclass(frozen=True)
class LoraTensors:
    """modules: by the base model's module name (`model.layers.0.self_attn.q_proj`).

    sections: name -> key -> array.
    """

    modules: Mapping[str, LoraModule] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, npt.NDArray[np.generic]]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Largest rank of any module; 0 when there is none."""
        return max((module.rank for module in self.modules.values()), default=0)


def encode(tensors: LoraTensors, encoding: Encoding = "float32") -> bytes:
    """Safetensors bytes of `tensors`, with the factors in this encoding.

    Raises LoraCodecError for factors or names that `decode` would refuse, and for values that are
    not finite or above LARGEST_VALUE where they would be rounded.
    """
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for name in sorted(tensors.modules):
        module = tensors.modules[name]
        _check_module(name, module.A, module.B, module.scale)
        for factor, values in (("A", module.A), ("B", module.B)):
            arrays |= _encoded(f"lora/{name}/{factor}", values, encoding)
    for section in sorted(tensors.sections):
        for key in sorted(tensors.sections[section]):
            if not section or not key or "/" in key:
                raise LoraCodecError(
                    f"Section {section!r} has key {key!r}; expected non-empty names and no '/' in "
                    "the key."
                )
            # Not ascontiguousarray: it makes a vector of a scalar.
            array = np.asarray(tensors.sections[section][key], order="C")
            arrays[f"section/{section}/{key}"] = array.astype(
                array.dtype.newbyteorder("<"), copy=False
            )
    scales = {name: float(module.scale) for name, module in tensors.modules.items()}
    document = canonical_json({"format": 1, "scales": scales}).decode()
    try:
        specs = {name: _spec(name, array) for name, array in arrays.items()}
        # One metadata key only: safetensors keeps metadata in a hash map whose order is not stable.
        return bytes(serialize(specs, metadata={METADATA_KEY: document}))
    except (SafetensorError, ValueError) as error:
        raise LoraCodecError(f"These tensors cannot be written as safetensors: {error}.") from error


def _encoded(name: str, values: Array, encoding: Encoding) -> dict[str, npt.NDArray[np.generic]]:
    """What is stored of one factor, by name."""
    if encoding == "float32":
        return {name: np.ascontiguousarray(values)}
    if not np.abs(values).max() <= LARGEST_VALUE:
        raise LoraCodecError(
            f"{name!r} has values that are not finite or above {LARGEST_VALUE:g}; {encoding} does "
            "not take them."
        )
    if encoding == "bf16":
        return {name: to_bf16(values)}
    integers, scales = to_int8(values)
    return {name: integers, f"{name}_scales": scales}


def _spec(name: str, array: npt.NDArray[np.generic]) -> TensorSpec:
    """Where safetensors finds the array, which must outlive it. A factor of uint16 is bf16."""
    bf16 = name.startswith("lora/") and array.dtype == np.uint16
    return TensorSpec(
        dtype="bfloat16" if bf16 else array.dtype.name,
        shape=array.shape,
        data_ptr=array.ctypes.data,
        data_len=array.nbytes,
    )


def decode(data: bytes) -> LoraTensors:
    """Factors in float32 and sections of `data`, whatever its encoding; raises LoraCodecError.

    Does not look for NaN.
    """
    scales = _read_scales(data)
    try:
        arrays = {name: _array(name, entry) for name, entry in deserialize(data)}  # type: ignore[no-untyped-call]
    except (SafetensorError, KeyError, ValueError) as error:
        raise LoraCodecError(f"Payload is not a readable safetensors file: {error}.") from error
    for name, array in sorted(arrays.items()):
        if name.startswith("lora/") and array.dtype == np.int8:
            arrays[name] = _from_int8(name, array, arrays.pop(f"{name}_scales", None))
    return assemble(scales, arrays)


def _array(name: str, entry: Mapping[str, Any]) -> npt.NDArray[np.generic]:
    if entry["dtype"] == "BF16" and name.startswith("lora/"):
        return from_bf16(np.frombuffer(entry["data"], np.uint16)).reshape(entry["shape"])
    return np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _from_int8(
    name: str, integers: npt.NDArray[np.generic], scales: npt.NDArray[np.generic] | None
) -> Array:
    count = block_count(integers.size)
    if scales is None or scales.dtype != np.float32 or scales.shape != (count,):
        found = "none" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        raise LoraCodecError(f"{name!r} is int8 with scales {found}; expected float32 [{count}].")
    return from_int8(cast("npt.NDArray[np.int8]", integers), cast(Array, scales))


def relative_error(sent: LoraTensors, meant: LoraTensors) -> float:
    """||sent - meant||_F / ||meant||_F of the products of all modules; 0 where both are zero.

    Both have the same modules and shapes. Three digits: BLAS decides the last ones.
    """
    change = whole = 0.0
    for name, module in meant.modules.items():
        new, square = sent.modules[name], module.scale**2
        # B A - B' A' = (B - B') A + B' (A - A'): no two large products are taken from each other.
        left = np.concatenate([module.B - new.B, new.B], axis=1)
        change += square * product_square(np.concatenate([module.A, module.A - new.A]), left)
        whole += square * product_square(module.A, module.B)
    return float(f"{math.sqrt(change / whole):.3g}") if whole > 0 else 0.0


def assemble(
    scales: Mapping[str, float], arrays: Mapping[str, npt.NDArray[np.generic]]
) -> LoraTensors:
    """Factors and sections from a payload's arrays by name; raises LoraCodecError.

    Reads no values.
    """
    factors: dict[str, dict[str, Array]] = {}
    sections: dict[str, dict[str, npt.NDArray[np.generic]]] = {}
    for name, array in sorted(arrays.items()):  # safetensors gives them in a random order
        kind, _, rest = name.partition("/")
        middle, _, last = rest.rpartition("/")
        if kind == "lora" and middle and last in ("A", "B"):
            factors.setdefault(middle, {})[last] = cast(Array, array)
        elif kind == "section" and middle and last:
            sections.setdefault(middle, {})[last] = array
        else:
            raise LoraCodecError(
                f"Unknown tensor {name!r}; expected lora/<module>/A, lora/<module>/B or "
                "section/<name>/<key>."
            )
    modules: dict[str, LoraModule] = {}
    for name, pair in factors.items():
        if set(pair) != {"A", "B"} or name not in scales:
            raise LoraCodecError(
                f"Module {name!r} has {sorted(pair)} and scale {scales.get(name)}; expected A, B "
                "and a scale."
            )
        _check_module(name, pair["A"], pair["B"], scales[name])
        modules[name] = LoraModule(pair["A"], pair["B"], scales[name])
    if set(scales) != set(modules):
        raise LoraCodecError(f"Scales without factors: {sorted(set(scales) - set(modules))[:3]}.")
    return LoraTensors(modules, sections)


def scales_of(header: Mapping[str, Any]) -> dict[str, float]:
    """Scale of each module by the parsed header of a payload; raises LoraCodecError."""
    try:
        document = json.loads(header["__metadata__"][METADATA_KEY])
        if document["format"] != 1:
            raise LoraCodecError(
                f"Payload has format {document['format']!r}; this software reads format 1."
            )
        scales = document["scales"].items()
        if not all(type(scale) in (int, float) for _, scale in scales):
            raise LoraCodecError(
                "Payload has a scale that is not a number; expected one number per module."
            )
        return {name: float(scale) for name, scale in scales}
    except LoraCodecError:
        raise
    except _UNREADABLE as error:
        raise LoraCodecError(
            f"Payload has no readable header with a {METADATA_KEY!r} entry: {error!r}."
        ) from error


def _read_scales(data: bytes) -> dict[str, float]:
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
    except _UNREADABLE as error:
        raise LoraCodecError(f"Payload has no readable header: {error!r}.") from error
    return scales_of(header)


def _check_module(name: str, a: Array, b: Array, scale: float) -> None:
    if not name:
        raise LoraCodecError("A module has an empty name; expected the base model's module name.")
    if a.dtype != np.float32 or b.dtype != np.float32:
        raise LoraCodecError(
            f"Module {name!r} has dtypes A {a.dtype}, B {b.dtype}; expected float32."
        )
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
        raise LoraCodecError(
            f"Module {name!r} has shapes A {a.shape}, B {b.shape}; expected [rank, in] and [out, "
            "rank]."
        )
    if not math.isfinite(scale):
        raise LoraCodecError(f"Module {name!r} has scale {scale}; expected a finite number.")
