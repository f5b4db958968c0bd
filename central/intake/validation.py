"""What an update must be before it is admitted: its manifest first, then its payload.

In: a manifest as sent with its signature; then the payload's bytes as they come, and in the end its file. Out: nothing, or
`Refused` that names what was wrong and what was expected. Guarantee: nothing is changed here. The header is checked before
any value, so that a bad shape costs no memory; each value is seen once (values.py), so that memory does not grow with the
update.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from central.errors import Reason, Refused
from central.intake.bounds import header_bytes
from central.intake.values import FLOAT_BYTES, Entry, Factor, Layout, SquareSums, check_norms, lay_out
from central.journal import NodeRecord, State
from central.settings import LimitSettings
from protos.lora import LoraCodecError, LoraTensors, assemble, scales_of
from protos.manifest import ManifestError, UpdateManifest, verify

KNOWN_HEADER_BYTES = 128 << 10
"""Larger ones are read again each time: 16 of them would take too much memory."""
Shapes = Mapping[str, tuple[int, int]]


Entries = dict[Factor, Entry]
_ZERO = b"\0\0\0\0"


def check_signature(node: NodeRecord, manifest: bytes, signature: bytes, max_bytes: int) -> UpdateManifest:
    """The manifest, if it is one and the node's key signed exactly these bytes; at most `max_bytes` are looked at."""
    if len(manifest) > max_bytes:  # it stays in the journal and in memory for ever
        raise _refused(
            Reason.TOO_LARGE,
            f"The manifest has {len(manifest)} bytes; for this base central reads at most {max_bytes}. Send fewer metrics.",
        )
    try:
        verify(node.public_key_pem.encode(), manifest, signature)
    except ManifestError as error:
        raise _refused(
            Reason.BAD_SIGNATURE, f"{error} Expected a signature by the key that node {node.node_id} enrolled."
        ) from error
    try:
        document = UpdateManifest.from_bytes(manifest)
    except ManifestError as error:
        raise _refused(Reason.BAD_MANIFEST, f"{error} Expected protos.manifest.UpdateManifest.") from error
    if document.node_id != node.node_id:
        raise _refused(
            Reason.BAD_MANIFEST,
            f"The manifest speaks for node {document.node_id}; the certificate is of {node.node_id}.",
        )
    return document


def check_manifest(state: State, node: NodeRecord, manifest: UpdateManifest, base: str, limits: LimitSettings) -> None:
    """Everything that can be said before the payload is here."""
    name = f"Update {manifest.digest[:12]}"
    if manifest.base != base:
        raise _refused(Reason.OTHER_BASE, f"{name} was trained on base {manifest.base}; central's base is {base}.")
    start = state.releases.get(manifest.start.release)
    if start is None or start.cohort != node.cohort:  # one answer: a node learns nothing of other cohorts' releases
        raise _refused(
            Reason.UNKNOWN_START,
            f"{name} starts from release {manifest.start.release}, which is not known in cohort {node.cohort!r}.",
        )
    expected = start.manifest.payload.digest_sha256
    if manifest.start.payload != expected or manifest.start.prefix_rank > start.manifest.rank:
        raise _refused(
            Reason.UNKNOWN_START,
            f"{name} starts from payload {manifest.start.payload} with prefix rank {manifest.start.prefix_rank}; release "
            f"{start.manifest.label} has payload {expected} and rank {start.manifest.rank}. Download the release again.",
        )
    if manifest.rank > limits.max_rank:
        raise _refused(
            Reason.RANK_TOO_LARGE,
            f"{name} has rank {manifest.rank}; central admits at most {limits.max_rank} (CENTRAL_LIMITS__MAX_RANK).",
        )
    if manifest.payload.size_bytes > limits.max_update_bytes:
        raise _refused(
            Reason.TOO_LARGE,
            f"{name} has {manifest.payload.size_bytes} bytes; central admits at most {limits.max_update_bytes} "
            "(CENTRAL_LIMITS__MAX_UPDATE_BYTES).",
        )
    if manifest.sections:
        raise _refused(
            Reason.UNKNOWN_SECTION,
            f"{name} has section {min(manifest.sections)!r}; this central reads none. Leave it out, or upgrade central.",
        )


class PayloadCheck:
    """Checks one payload while it comes. What is wrong is said at the end, when its digest is known to be the manifest's."""

    def __init__(self, manifest: UpdateManifest, shapes: Shapes, limits: LimitSettings) -> None:
        self._manifest = manifest
        self._shapes = shapes
        self._limits = limits
        self._max_header_bytes = header_bytes(shapes)
        self._position = 0
        self._start = bytearray()
        """The file's beginning, until the header is complete."""
        self._header: _Header | None = None
        self._sums = SquareSums(())
        self._refusal: Refused | None = None

    def feed(self, data: memoryview) -> None:
        """Look at the next bytes: a multiple of 4, unless they are the last. Never raises Refused."""
        if self._refusal is None:
            try:
                self._look(data)
            except Refused as refusal:
                # Without its traceback, which would keep what was parsed for as long as the stream lives.
                self._refusal = Refused(refusal.status, refusal.reason, str(refusal))
                self._start.clear()
        self._position += len(data)

    def finish(self, path: Path) -> None:
        """Raises Refused for what is wrong with the payload, which is complete at `path`, and StorageError when that cannot be read."""
        if self._refusal is not None:
            raise self._refusal
        header = self._header
        if header is None:
            raise _refused(
                Reason.MALFORMED_PAYLOAD,
                f"The payload ends within its header, after {self._position} bytes. See protos/lora.py.",
            )
        check_norms(self._sums, path, header.size, header.entries, header.scales, self._limits.max_norm)

    def _look(self, data: memoryview) -> None:
        if self._header is None:
            begin = len(self._start)
            self._start += data
            size = _header_size(self._start, self._max_header_bytes)
            if size is None:
                return
            self._header = self._read_header(bytes(self._start[:size]))
            self._sums = SquareSums(self._header.layout)
            self._start.clear()
            data, position = data[size - begin :], size
        else:
            position = self._position
        self._sums.add(data, position - self._header.size)

    def _read_header(self, data: bytes) -> _Header:
        manifest = self._manifest
        read = _read_header if len(data) <= KNOWN_HEADER_BYTES else _read_header.__wrapped__
        header = read(data, manifest.payload.size_bytes)
        _check_shapes(header.entries, manifest, self._shapes)
        if header.rank != manifest.rank:
            raise _refused(Reason.BAD_SHAPE, f"Largest rank is {header.rank}; the manifest says {manifest.rank}.")
        if header.sections != manifest.sections:
            raise _refused(
                Reason.UNKNOWN_SECTION, f"Sections are {header.sections}; the manifest says {manifest.sections}."
            )
        return header


@dataclass(frozen=True)
class _Header:
    """What a payload's header says."""

    size: int
    """In bytes, with the eight of its length: where the values begin."""
    entries: Entries
    layout: Layout
    scales: dict[str, float]
    rank: int
    sections: list[str]


@lru_cache(maxsize=16)
def _read_header(data: bytes, size_bytes: int) -> _Header:
    """The header of a payload of `size_bytes`, if protos.lora.decode would read it; raises Refused.

    Nodes with one configuration send the same header with every update, and reading it costs as much as hashing 500 KB.
    """
    document = _parse(data)
    entries = _lora_entries(document)
    if len(data) % FLOAT_BYTES:
        raise _refused(
            Reason.MALFORMED_PAYLOAD,
            f"The payload's header has {len(data)} bytes with its length; expected a multiple of 8, as safetensors' writers pad it.",
        )
    tensors = _decode_layout(data, document, size_bytes)
    scales = {name: module.scale for name, module in tensors.modules.items()}
    return _Header(len(data), entries, lay_out(entries), scales, tensors.rank, sorted(tensors.sections))


def _header_size(start: bytearray, max_bytes: int) -> int | None:
    """Bytes of the header with its length; None while they are not all there."""
    if len(start) < 8:
        return None
    size = int.from_bytes(start[:8], "little")
    if size > max_bytes:
        raise _refused(
            Reason.MALFORMED_PAYLOAD,
            f"The payload's header has {size} bytes; for this base central reads at most {max_bytes}.",
        )
    return 8 + size if len(start) >= 8 + size else None


def _parse(header: bytes) -> dict[str, Any]:
    try:
        document = json.loads(header[8:])
        if isinstance(document, dict):
            return document
        raise ValueError(f"its header is a {type(document).__name__}")
    except (ValueError, RecursionError, MemoryError) as error:
        raise _refused(
            Reason.MALFORMED_PAYLOAD, f"The payload is not a readable safetensors file: {error!r}. See protos/lora.py."
        ) from error


def _decode_layout(header: bytes, document: Mapping[str, Any], size_bytes: int) -> LoraTensors:
    """What `protos.lora.decode` would return, with stand-ins that take no memory for the values."""
    # The same parser as decode's. It wants a file: one in memory, of the payload's size, of which only the header exists.
    descriptor = os.memfd_create("header")
    try:
        os.write(descriptor, header)
        os.ftruncate(descriptor, size_bytes)
        with safe_open(f"/proc/self/fd/{descriptor}", framework="numpy") as payload:
            standins = {
                name: _standin(payload.get_slice(name).get_shape())
                for name in payload.keys()  # noqa: SIM118
            }
        return assemble(scales_of(document), standins)
    except (SafetensorError, LoraCodecError, ValueError) as error:
        raise _refused(Reason.MALFORMED_PAYLOAD, f"The payload is not a LoRA safetensors file: {error}.") from error
    finally:
        os.close(descriptor)


def _standin(shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """An array of this shape that is one zero, as `np.broadcast_to` makes it at ten times the cost."""
    return np.ndarray(shape, np.float32, _ZERO, 0, (0,) * len(shape))


def _check_shapes(entries: Entries, manifest: UpdateManifest, shapes: Shapes) -> None:
    if not entries:
        raise _refused(Reason.MALFORMED_PAYLOAD, "The payload has no LoRA factors; expected at least one module.")
    for (module, factor), (dtype, shape, _) in entries.items():
        if module not in shapes:
            raise _refused(
                Reason.UNKNOWN_MODULE,
                f"Module {module!r} is not one that LoRA may target here; expected a linear module of the base model, "
                f"for example {next(iter(shapes), 'none')!r}.",
            )
        if dtype != "F32":
            raise _refused(Reason.BAD_DTYPE, f"Module {module!r} has {factor} in {dtype}; expected float32 (F32).")
        out_features, in_features = shapes[module]
        rank, features = (shape[0], shape[1]) if factor == "A" else (shape[1], shape[0])
        expected = in_features if factor == "A" else out_features
        if features != expected or rank < 1:
            wanted = f"[rank, {in_features}]" if factor == "A" else f"[{out_features}, rank]"
            raise _refused(Reason.BAD_SHAPE, f"Module {module!r} has {factor} of shape {shape}; expected {wanted}.")
        if rank > manifest.rank:
            raise _refused(
                Reason.RANK_TOO_LARGE, f"Module {module!r} has rank {rank}; the manifest says at most {manifest.rank}."
            )


def _lora_entries(document: Mapping[str, Any]) -> Entries:
    """What the safetensors header says of each factor; other tensors are left to the codec."""
    found: Entries = {}
    try:
        for name, entry in document.items():
            kind, _, rest = name.partition("/")
            module, _, factor = rest.rpartition("/")
            if kind == "lora" and factor in ("A", "B"):
                shape = entry["shape"]
                if len(shape) != 2:
                    raise _refused(
                        Reason.BAD_SHAPE, f"Module {module!r} has {factor} of shape {shape}; expected two dimensions."
                    )
                begin = int(entry["data_offsets"][0])
                found[module, factor] = Entry(str(entry["dtype"]), (int(shape[0]), int(shape[1])), begin)
    except Refused:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _refused(
            Reason.MALFORMED_PAYLOAD, f"The payload is not a readable safetensors file: {error!r}. See protos/lora.py."
        ) from error
    return found


def _refused(reason: Reason, message: str) -> Refused:
    status = grpc.StatusCode.INVALID_ARGUMENT
    if reason in (Reason.OTHER_BASE, Reason.UNKNOWN_START):
        status = grpc.StatusCode.FAILED_PRECONDITION
    return Refused(status, reason, message)
