"""The LoRA codec: factors and named sections <-> one safetensors file; both sides agree to the byte.

In: `LoraTensors`. Out: safetensors bytes (never pickle), and back. Layout of the file: tensors `lora/<module>/A`
float32 [rank, in_features], `lora/<module>/B` float32 [out_features, rank] and `section/<name>/<key>` of any dtype;
one metadata entry `lorikeet` with canonical JSON `{"format":1,"scales":{module: scale}}`. The increment of a module is
`dW = scale * B @ A` (LoRA, arXiv:2106.09685, section 4.1; scale = alpha/r, or alpha/sqrt(r) for rsLoRA, 2312.03732).
The same input gives the same bytes on every machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from protos.manifest import canonical_json

Array = npt.NDArray[np.float32]
METADATA_KEY = "lorikeet"
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError)
"""What a header that somebody made up can raise."""


class LoraCodecError(ValueError):
    """The bytes are not a LoRA payload; the message names the tensor and what was expected."""


@dataclass(frozen=True)
class LoraModule:
    """One module's factors: `A` float32 [rank, in_features], `B` float32 [out_features, rank], dW = scale * B @ A."""

    A: Array
    B: Array
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])


@dataclass(frozen=True)
class LoraTensors:
    """modules: by the base model's module name (`model.layers.0.self_attn.q_proj`); sections: name -> key -> array."""

    modules: Mapping[str, LoraModule] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, npt.NDArray[np.generic]]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Largest rank of any module; 0 when there is none."""
        return max((module.rank for module in self.modules.values()), default=0)


def encode(tensors: LoraTensors) -> bytes:
    """Safetensors bytes of `tensors`; raises LoraCodecError for factors or names that `decode` would refuse."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for name in sorted(tensors.modules):
        module = tensors.modules[name]
        _check_module(name, module.A, module.B, module.scale)
        arrays[f"lora/{name}/A"] = np.ascontiguousarray(module.A)
        arrays[f"lora/{name}/B"] = np.ascontiguousarray(module.B)
    for section in sorted(tensors.sections):
        for key in sorted(tensors.sections[section]):
            if not section or not key or "/" in key:
                raise LoraCodecError(
                    f"Section {section!r} has key {key!r}; expected non-empty names and no '/' in the key."
                )
            # Not ascontiguousarray: it makes a vector of a scalar.
            arrays[f"section/{section}/{key}"] = np.asarray(tensors.sections[section][key], order="C")
    scales = {name: float(module.scale) for name, module in tensors.modules.items()}
    # One metadata key only: safetensors keeps metadata in a hash map whose order is not stable.
    try:
        data: bytes = save(arrays, metadata={METADATA_KEY: canonical_json({"format": 1, "scales": scales}).decode()})
    except (SafetensorError, ValueError) as error:
        raise LoraCodecError(f"These tensors cannot be written as safetensors: {error}.") from error
    return data


def decode(data: bytes) -> LoraTensors:
    """Factors and sections in `data`; raises LoraCodecError. Values are not checked for NaN here."""
    scales = _read_scales(data)
    try:
        arrays = load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise LoraCodecError(f"Payload is not a readable safetensors file: {error}.") from error
    return assemble(scales, arrays)


def assemble(scales: Mapping[str, float], arrays: Mapping[str, npt.NDArray[np.generic]]) -> LoraTensors:
    """Factors and sections from the arrays by their names in a payload; raises LoraCodecError. Reads no values."""
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
                f"Unknown tensor {name!r}; expected lora/<module>/A, lora/<module>/B or section/<name>/<key>."
            )
    modules: dict[str, LoraModule] = {}
    for name, pair in factors.items():
        if set(pair) != {"A", "B"} or name not in scales:
            raise LoraCodecError(
                f"Module {name!r} has {sorted(pair)} and scale {scales.get(name)}; expected A, B and a scale."
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
            raise LoraCodecError(f"Payload has format {document['format']!r}; this software reads format 1.")
        scales = document["scales"].items()
        if not all(type(scale) in (int, float) for _, scale in scales):
            raise LoraCodecError("Payload has a scale that is not a number; expected one number per module.")
        return {name: float(scale) for name, scale in scales}
    except LoraCodecError:
        raise
    except _UNREADABLE as error:
        raise LoraCodecError(f"Payload has no readable header with a {METADATA_KEY!r} entry: {error!r}.") from error


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
        raise LoraCodecError(f"Module {name!r} has dtypes A {a.dtype}, B {b.dtype}; expected float32.")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
        raise LoraCodecError(
            f"Module {name!r} has shapes A {a.shape}, B {b.shape}; expected [rank, in] and [out, rank]."
        )
    if not math.isfinite(scale):
        raise LoraCodecError(f"Module {name!r} has scale {scale}; expected a finite number.")
