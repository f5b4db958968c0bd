"""PEFT's reference of each release, made once and kept on disk beside the versions.

In: a release on disk, and the one before it. Out: its Reference. Guarantees: a file that is
damaged, or was made of another base or of other weights, is made again; a base that does not fit
into memory a second time is not loaded. At most one reference is made at a time.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edge_node.disk import read_json, write_file
from edge_node.errors import StorageError
from edge_node.learning.compute import count_parameters
from edge_node.proof.distance import Reference
from edge_node.proof.room import free_bytes, needed_bytes
from edge_node.releases.store import StoredRelease
from protos.base import BaseModelInfo
from protos.manifest import canonical_json, sha256_hex

log = logging.getLogger(__name__)

FORM = 1
"""Of the file and of how canaries are made; another number is made again."""
TOKENS = 144
"""Of a canary: more than a block of the KV cache, which has 128 tokens on CPU, so that the prefix
cache is read."""


class NoReference(Exception):
    """Why there is none: weights alone are compared."""


class NoRoom(NoReference):
    """The base does not fit into memory a second time: no trouble, but a property of the node."""


class Reckons(Protocol):
    """What References needs of the process that computes."""

    async def ask(self, order: Mapping[str, Any]) -> Mapping[str, Any]: ...


class References:
    """Owner of `releases/proofs` in the data directory."""

    def __init__(
        self, data_dir: Path, base: BaseModelInfo, reckoner: Reckons, longest_context: int
    ) -> None:
        self._folder = data_dir / "releases" / "proofs"
        self._base = base
        self._reckoner = reckoner
        self._tokens = min(TOKENS, longest_context - 2)
        self._one = asyncio.Lock()

    async def of(self, release: StoredRelease, before: StoredRelease | None) -> Reference:
        """Made if it is not there; `before`: what the canaries must tell from it, besides the base.

        Raises NoReference.
        """
        async with self._one:
            found = await asyncio.to_thread(self.kept, release)
            return found if found is not None else await self._make(release, before)

    def kept(self, release: StoredRelease) -> Reference | None:
        """From disk; None when there is none that can be used."""
        path = self._path(release)
        try:
            document = read_json(path)
            body = document["reference"]
            if document["digest"] != _digest(body) or document["of"] != self._identity(release):
                raise ValueError("it is damaged, or of other weights")
            return _read(body)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning(
                "reference is made again", extra={"path": path, "why": type(error).__name__}
            )
            return None

    def sweep(self) -> None:
        """Deletes those whose version is gone."""
        for path in self._folder.glob("*.json"):
            if not (self._folder.parent / "versions" / path.stem).is_dir():
                path.unlink(missing_ok=True)

    async def _make(self, release: StoredRelease, before: StoredRelease | None) -> Reference:
        parameters = await asyncio.to_thread(count_parameters, self._base.path)
        needed, free = needed_bytes(parameters), await asyncio.to_thread(free_bytes)
        if needed > free:
            raise NoRoom(
                f"a second copy of the base needs {needed / 2**30:.1f} GiB of memory, and "
                f"{free / 2**30:.1f} GiB are free"
            )
        order = {
            "base": str(self._base.path.absolute()),
            "release": str(release.path.absolute()),
            "before": None if before is None else str(before.path.absolute()),
            "tokens": self._tokens,
            "parameters": parameters,
            "seed": int(self._base.digest[:12], 16),
        }
        body = await self._reckoner.ask(order)
        try:
            reference = _read(body)
        except (KeyError, TypeError, ValueError) as error:
            raise NoReference(f"PEFT's reference cannot be used: {error!r}") from error
        document = {"of": self._identity(release), "digest": _digest(body), "reference": body}
        try:
            await asyncio.to_thread(write_file, self._path(release), json.dumps(document).encode())
            await asyncio.to_thread(self.sweep)
        except (StorageError, OSError) as error:  # it serves now, and is made again at a restart
            log.warning("reference not kept", extra={"why": str(error)})
        return reference

    def _path(self, release: StoredRelease) -> Path:
        return self._folder / f"{release.release_id}.json"

    def _identity(self, release: StoredRelease) -> dict[str, Any]:
        rank = read_json(release.path / "adapter_config.json")["r"]
        return {
            "form": FORM, "base": self._base.digest, "release": release.release_id, "rank": rank,
            "tokens": self._tokens,
        }  # fmt: skip


def _digest(body: Any) -> str:
    return sha256_hex(canonical_json(body))


def _read(body: Mapping[str, Any]) -> Reference:
    """Raises KeyError, TypeError, ValueError for what is no reference."""
    reference = Reference(
        prompts=[[int(token) for token in row] for row in body["prompts"]],
        release=np.array(body["release"], np.float32),
        base=np.array(body["base"], np.float32),
    )
    rows, columns = len(reference.prompts), len(reference.prompts[0]) - 1
    for values in (reference.release, reference.base):
        if values.shape != (rows, columns) or not np.isfinite(values).all():
            raise ValueError(f"log-probabilities have shape {values.shape}, or are not finite")
    return reference
