"""Named sections of an update: only what a merge rule of this software reads, and only when it could read it.

In: a payload's header and file. Out: nothing, or `Refused` that names the section. There is one kind: `gram/<module>`, a sketch of
the activation statistics of one of the base's modules (central/merging/regmean.py), `U` float32 [in_features, k] and `c`, one
float32. Headers are checked before values are read, and values one section at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np

from central.durable import storage
from central.errors import Reason, Refused
from central.merging.regmean import SECTION
from central.settings import LimitSettings

_KEYS = ("U", "c")


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int


def is_known(section: str) -> bool:
    """Whether it is of a kind that this software reads."""
    return section.startswith(SECTION)


def check_sections(
    path: Path, start: int, header: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], limits: LimitSettings
) -> None:
    """Raises Refused for a section that no merge could read; `header` is that of the payload at `path`, whose values begin at byte `start`."""
    found: dict[str, dict[str, _Entry]] = {}
    for name, entry in header.items():
        kind, _, rest = name.partition("/")
        section, _, key = rest.rpartition("/")
        if kind == "section":
            found.setdefault(section, {})[key] = _entry(entry)
    for section, entries in found.items():
        module = section.removeprefix(SECTION)
        if not is_known(section) or sorted(entries) != sorted(_KEYS):
            raise _refused(
                Reason.UNKNOWN_SECTION,
                f"Section {section!r} holds {sorted(entries)}; expected {SECTION}<module> with U and c.",
            )
        if module not in shapes:
            raise _refused(
                Reason.UNKNOWN_MODULE,
                f"Section {section!r} is of a module that is not in the base; expected a linear module of the base model, for "
                f"example {next(iter(shapes), 'none')!r}.",
            )
        _check_layout(section, entries, shapes[module][1], limits.max_gram_rank)
        U, c = (_read(path, start, entries[key]) for key in _KEYS)
        _check_values(section, U, float(c[0]))


def _check_layout(section: str, entries: Mapping[str, _Entry], in_features: int, max_rank: int) -> None:
    for key in _KEYS:
        if entries[key].dtype != "F32":
            raise _refused(
                Reason.BAD_DTYPE, f"Section {section!r} has {key} in {entries[key].dtype}; expected float32 (F32)."
            )
    U, c = entries["U"].shape, entries["c"].shape
    if len(U) != 2 or U[0] != in_features or U[1] < 1 or math.prod(c) != 1:
        raise _refused(
            Reason.BAD_SHAPE,
            f"Section {section!r} has U of shape {list(U)} and c of shape {list(c)}; expected [{in_features}, k] and one number.",
        )
    if U[1] > max_rank:
        raise _refused(
            Reason.RANK_TOO_LARGE,
            f"Section {section!r} has rank {U[1]}; central admits at most {max_rank} (CENTRAL_LIMITS__MAX_GRAM_RANK).",
        )


def _check_values(section: str, U: np.ndarray[Any, np.dtype[np.float32]], c: float) -> None:
    if not (np.isfinite(U).all() and math.isfinite(c)):
        raise _refused(Reason.NOT_FINITE, f"Section {section!r} has NaN or infinite values; expected finite numbers.")
    if c < 0 or (c == 0 and not U.any()):
        raise _refused(
            Reason.NORM_OUT_OF_BOUNDS,
            f"Section {section!r} has c {c:g} and a U that is {'not ' if U.any() else ''}zero; expected c of zero or more, and not "
            "both zero.",
        )


def _read(path: Path, start: int, entry: _Entry) -> np.ndarray[Any, np.dtype[np.float32]]:
    with storage(path):
        return np.fromfile(path, np.float32, math.prod(entry.shape), offset=start + entry.begin)


def _entry(entry: Mapping[str, Any]) -> _Entry:
    return _Entry(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), int(entry["data_offsets"][0]))


def _refused(reason: Reason, message: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, reason, message)
