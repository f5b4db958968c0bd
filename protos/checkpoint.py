"""The weight files of a Hugging Face model directory: which are read, and whether each is whole.

In: a directory. Out: files, and the tensors that they hold (dtype and shape). Reads headers only
and imports no torch. Guarantees: the files are those that vLLM and transformers both read; a
missing, cut, foreign or doubled one is refused.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
_POINTER = b"version https://git-lfs.github.com/spec/"
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16), **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64), "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


class BaseModelError(ValueError):
    """The directory is not a usable base model.

    The message says what was seen, what was expected and what to do.
    """


@dataclass(frozen=True)
class TensorInfo:
    """dtype: as safetensors calls it (F32, BF16); shape: of the stored tensor."""

    dtype: str
    shape: tuple[int, ...]


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold the model, by name; raises BaseModelError."""
    if (path / INDEX).exists():
        return sorted(path / name for name in set(_weight_map(path).values()))
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if SINGLE not in found:
        raise BaseModelError(f"{path} holds no usable weights: {_instead(path, found)}")
    if others := [name for name in found if name != SINGLE]:
        raise BaseModelError(
            f"{path} holds {', '.join(others[:3])} beside {SINGLE}; vLLM would read all of them, "
            f"and transformers only {SINGLE}. Move the others out of the directory."
        )
    return [path / SINGLE]


def read_tensors(path: Path, files: list[Path]) -> dict[str, TensorInfo]:
    """Every tensor of `files` by its name.

    Raises BaseModelError when a file or the index does not fit.
    """
    tensors: dict[str, TensorInfo] = {}
    held_by: dict[str, str] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise BaseModelError(
                    f"Tensor {name!r} is in {held_by[name]} and in {file.name}; expected it once. "
                    f"Download the model's files again into an empty directory."
                )
            tensors[name], held_by[name] = tensor, file.name
    for name, wanted in (_weight_map(path) if (path / INDEX).exists() else {}).items():
        if held_by.get(name) != wanted:
            raise BaseModelError(
                f"{INDEX} says that tensor {name!r} is in {wanted}; it is "
                f"{_where(held_by.get(name))}. The files are of different versions of the model: "
                "download all of them again."
            )
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file that is whole; raises BaseModelError."""
    expect_no_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise _unreadable(file, f"it has {size} bytes and a header of {length}")
        if 8 + length > size:
            raise _cut(file, size, 8 + length)
        try:
            header = json.loads(stream.read(length))
            entries = {
                name: _entry(value) for name, value in header.items() if name != "__metadata__"
            }
        except (
            ValueError,
            AttributeError,
            KeyError,
            TypeError,
            RecursionError,
            MemoryError,
        ) as error:
            raise _unreadable(file, "its header is no table of tensors") from error
    _expect_whole(file, entries, size - 8 - length)
    return {name: tensor for name, (tensor, _, _) in entries.items()}


def expect_no_pointer(file: Path) -> None:
    """Raises BaseModelError for a git-lfs pointer in the place of a file."""
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise BaseModelError(
                f"{file} is a git-lfs pointer, not the file itself. Run `git lfs pull` in the "
                "model's repository, or download the file."
            )


def unreadable(path: Path, error: OSError) -> BaseModelError:
    """What is wrong with a file of the base model at `path`, and what its owner does about it."""
    file = Path(error.filename or path)
    if not isinstance(error, PermissionError):
        return BaseModelError(
            f"{file} cannot be read: {error.strerror}. Expected a file there; download it again."
        )
    try:
        status = file.stat()
    except OSError:
        said, step = "a directory above it is closed", "Run `chmod a+x` on each directory above it"
    else:
        said = f"it belongs to user {status.st_uid} and has mode {stat.S_IMODE(status.st_mode):o}"
        step = (
            f"Run `chmod -R a+rX {path}` as its owner, and the same on what the links in it point "
            "to"
        )
    return BaseModelError(f"{file} cannot be read by user {os.geteuid()}: {said}. {step}.")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; raises BaseModelError."""
    expect_no_pointer(file)
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BaseModelError(f"{file} is not JSON: {error}. Download it again.") from error
    if not isinstance(document, dict):
        raise BaseModelError(
            f"{file} holds {type(document).__name__}; expected a JSON object. Download it again."
        )
    return document


def _weight_map(path: Path) -> Mapping[str, str]:
    weights = read_json(path / INDEX).get("weight_map")
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(name, str) for name in weights.values())
    ):
        raise BaseModelError(
            f"{path / INDEX} has no table weight_map of tensors and their files. Download it again."
        )
    for name in sorted(set(weights.values())):
        if "/" in name or not name.endswith(".safetensors"):
            raise BaseModelError(
                f"{INDEX} names {name!r}; expected safetensors files in {path} itself. Put the "
                "weights there."
            )
        if not (path / name).is_file():
            raise BaseModelError(
                f"{INDEX} names {name}, which is not in {path}. Download that file."
            )
    if (path / SINGLE).exists() and SINGLE not in weights.values():
        raise BaseModelError(
            f"{path} holds {SINGLE} beside the files that {INDEX} names; transformers would read "
            "the first and vLLM the others. Move one of both out of the directory."
        )
    return weights


def _instead(path: Path, found: list[str]) -> str:
    if not found:
        others = sorted(
            file.name for kind in ("*.bin", "*.gguf", "*.pth", "*.pt") for file in path.glob(kind)
        )
        seen = f"{others[0]} is there instead" if others else "no *.safetensors found"
        return (
            f"{seen}. Expected {SINGLE}, or {INDEX} and the files that it names. Convert or "
            "download them."
        )
    if all(name.startswith("consolidated") for name in found):
        return (
            f"{found[0]} is Mistral's own format. Expected {SINGLE}, or {INDEX} and the files that "
            "it names. Download those."
        )
    return f"{', '.join(found[:3])} found, but neither {SINGLE} nor {INDEX}. Download {INDEX}."


def _where(name: str | None) -> str:
    return f"in {name}" if name else "in none of its files"


def _entry(value: Any) -> tuple[TensorInfo, int, int]:
    shape, (begin, end) = tuple(value["shape"]), value["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("not a size")
    return TensorInfo(str(value["dtype"]), shape), begin, end


def _expect_whole(
    file: Path, entries: Mapping[str, tuple[TensorInfo, int, int]], data_bytes: int
) -> None:
    if not entries:
        raise _unreadable(file, "it holds no tensor")
    position = 0
    for name, (tensor, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][1:]):
        bits = _BITS.get(tensor.dtype)
        fits = bits is None or 8 * (end - begin) == bits * math.prod(tensor.shape)
        if begin != position or end < begin or not fits:
            raise _unreadable(
                file,
                f"tensor {name!r} ({tensor.dtype} {list(tensor.shape)}) has bytes {begin} to {end}",
            )
        position = end
    if position > data_bytes:
        raise _cut(file, file.stat().st_size, file.stat().st_size - data_bytes + position)
    if position < data_bytes:
        raise _unreadable(file, f"{data_bytes - position} bytes follow its last tensor")


def _unreadable(file: Path, why: str) -> BaseModelError:
    return BaseModelError(f"{file} is not a safetensors file: {why}. Download it again.")


def _cut(file: Path, size: int, expected: int) -> BaseModelError:
    return BaseModelError(
        f"{file} is cut off: it has {size} bytes, and its header says {expected}. Download it "
        "again."
    )
