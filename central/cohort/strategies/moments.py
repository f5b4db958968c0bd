"""What a stock strategy carries from merge to merge, for example FedAdam's moments.

In: a strategy after a merge, or a blob. Out: a blob, or a strategy that goes on from it.
Guarantees: the same state gives the same bytes (safetensors, never pickle); a strategy that goes on
from a blob does to the bit what it would have done unstopped.

A release keeps the state that its merge left; its candidate_built event names the blob. A merge
goes on from its parent's state. So the state follows the tree of releases: after a rollback it is
that of the release returned to, and that of a rejected candidate is never used. Nothing else holds
state, because every merge makes its strategy anew.

What the moments are of: FedOpt's pseudo-gradient (Reddi et al., arXiv:2003.00295, algorithm 2) is
the mean of x_i - x. An increment starts from zero, so x = 0. The pseudo-gradient is then the
averaged increment, entry by entry of A and of scale * B. What the optimiser makes of it is added to
the parent.

Limit: A and B depend on the basis that a node's seed chose, because B T^-1 and T A are the same
increment. So do their moments. They mean as much as the average of factors does (flower.py).

Shapes: a module's arrays have the largest rank met so far, and a module that was met stays. Smaller
arrays are padded with zeros. This is exact: entries that were always zero have moments of zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.serverapp.strategy import FedAvg

from central.cohort.errors import FederationError
from protos.lora import LoraCodecError, LoraTensors, decode, encode

Moments = Mapping[str, npt.NDArray[Any]]
"""`<module>/A` [rank, in_features] and `<module>/B` [out_features, rank], entry by entry."""
Shapes = Mapping[str, tuple[tuple[int, int], tuple[int, int]]]
"""Shapes of A and B by module."""

CARRIED: Mapping[str, tuple[str, ...]] = {
    "FedAdagrad": ("m_t", "v_t"),
    "FedAdam": ("m_t", "v_t"),
    "FedAvgM": ("momentum_vector",),
    "FedYogi": ("m_t", "v_t"),
}
"""The attributes that are state, by strategy. `check_strategy` refuses arrays anywhere else."""
_COUNT, _MERGES = "strategy", "merges"


@dataclass(frozen=True)
class ServerState:
    """merges: how many made it, for FedAdam's bias correction; moments: by attribute."""

    merges: int = 0
    moments: Mapping[str, Moments] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """One blob."""
        sections: dict[str, dict[str, npt.NDArray[Any]]] = {
            _COUNT: {_MERGES: np.array(self.merges, np.int64)}
        }
        for attribute, moments in self.moments.items():
            for key, array in moments.items():
                module, _, factor = key.rpartition("/")
                sections.setdefault(f"{attribute}/{module}", {})[factor] = array
        return encode(LoraTensors(sections=sections))

    @classmethod
    def from_bytes(cls, data: bytes) -> ServerState:
        """The opposite; raises FederationError for anything else."""
        try:
            sections = dict(decode(data).sections)
            merges = int(sections.pop(_COUNT)[_MERGES])
        except (LoraCodecError, KeyError, TypeError, ValueError) as error:
            raise FederationError(
                f"A blob is not the server state of a strategy: {error!r}."
            ) from error
        moments: dict[str, dict[str, npt.NDArray[Any]]] = {}
        for section, factors in sections.items():
            attribute, _, module = section.partition("/")
            for factor, array in factors.items():
                moments.setdefault(attribute, {})[f"{module}/{factor}"] = array
        return cls(merges, moments)

    @property
    def shapes(self) -> Shapes:
        """Shapes of A and B of every module that was met."""
        found = next(iter(self.moments.values()), {})
        modules = sorted(key.removesuffix("/A") for key in found if key.endswith("/A"))
        return {name: (_shape(found[f"{name}/A"]), _shape(found[f"{name}/B"])) for name in modules}


def put_state(stock: FedAvg, state: ServerState, shapes: Shapes) -> None:
    """Give a new strategy the state, padded to `shapes`."""
    for attribute, moments in state.moments.items():
        padded = {
            f"{name}/{factor}": _pad(moments.get(f"{name}/{factor}"), shape)
            for name, pair in shapes.items()
            for factor, shape in zip("AB", pair, strict=True)
        }
        # FedAvgM keeps a list in the order of the arrays, the others a dictionary.
        setattr(
            stock, attribute, list(padded.values()) if attribute == "momentum_vector" else padded
        )


def take_state(stock: FedAvg, before: ServerState, shapes: Shapes) -> ServerState | None:
    """The state after a merge that went on from `before`; None for a strategy without any."""
    keys = [f"{name}/{factor}" for name in shapes for factor in "AB"]
    moments: dict[str, Moments] = {}
    for attribute in CARRIED.get(type(stock).__name__, ()):
        value = getattr(stock, attribute)
        if value is None:
            continue
        moments[attribute] = (
            value if isinstance(value, dict) else dict(zip(keys, value, strict=True))
        )
    return ServerState(before.merges + 1, moments) if moments else None


def _pad(array: npt.NDArray[Any] | None, shape: tuple[int, int]) -> npt.NDArray[Any]:
    if array is None:
        return np.zeros(shape, np.float32)
    padded = np.zeros(shape, array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


def _shape(array: npt.NDArray[Any]) -> tuple[int, int]:
    return int(array.shape[0]), int(array.shape[1])
