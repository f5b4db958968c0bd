"""What an update must be before it is admitted: its manifest first, then its payload.

In: a manifest as sent with its signature; later the payload's file. Out: nothing, or `Refused` that names what was
wrong and what was expected. Guarantee: nothing is changed here. Headers are checked before tensors are read, so that a
bad shape costs no memory; values are read in blocks (values.py), so that memory does not grow with the update.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import grpc
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from central.durable import storage
from central.errors import Reason, Refused
from central.intake.sections import check_sections, is_known
from central.intake.values import Entry, Factor, check_values
from central.journal import NodeRecord, State
from central.settings import LimitSettings
from protos.lora import LoraCodecError, LoraTensors, assemble, read_scales
from protos.manifest import ManifestError, UpdateManifest, verify

MAX_MANIFEST_BYTES = 64 << 10
MAX_HEADER_BYTES = 8 << 20
"""Of a payload's safetensors header; parsed, it takes many times as much memory."""
Shapes = Mapping[str, tuple[int, int]]


Entries = dict[Factor, Entry]
_ZERO = b"\0\0\0\0"


def check_signature(node: NodeRecord, manifest: bytes, signature: bytes) -> UpdateManifest:
    """The manifest, if it is one and the node's key signed exactly these bytes."""
    if len(manifest) > MAX_MANIFEST_BYTES:  # it stays in the journal and in memory for ever
        raise _refused(
            Reason.TOO_LARGE, f"The manifest has {len(manifest)} bytes; central reads at most {MAX_MANIFEST_BYTES}."
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
    gone = state.collected.get(expected)
    if gone and not state.has_forgotten(
        start.release_id
    ):  # an increment needs no start; what re-solves leaves that one out
        raise _refused(
            Reason.UNKNOWN_START,
            f"{name} starts from release {start.manifest.label}, whose payload was {gone.text}. The next round starts from a newer "
            "release.",
        )
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
    unknown = sorted(section for section in manifest.sections if not is_known(section))
    if unknown:
        raise _refused(
            Reason.UNKNOWN_SECTION,
            f"{name} has section {unknown[0]!r}; this central reads gram/<module>. Leave it out, or upgrade central.",
        )


def check_payload(path: Path, manifest: UpdateManifest, shapes: Shapes, limits: LimitSettings) -> None:
    """The structure of the payload at `path`, then its values.

    Uses CPU and disk: call it off the event loop. Raises Refused, and StorageError when the file cannot be read.
    """
    with storage(path), path.open("rb") as stream:
        header = _read_header(stream)
        entries = _lora_entries(header)
        _check_shapes(entries, manifest, shapes)
        tensors = _decode_layout(path, header)
        if tensors.rank != manifest.rank:
            raise _refused(Reason.BAD_SHAPE, f"Largest rank is {tensors.rank}; the manifest says {manifest.rank}.")
        if sorted(tensors.sections) != manifest.sections:
            raise _refused(
                Reason.UNKNOWN_SECTION,
                f"Sections are {sorted(tensors.sections)}; the manifest says {manifest.sections}.",
            )
        scales = {name: layout.scale for name, layout in tensors.modules.items()}
        check_values(stream.fileno(), len(header), entries, scales, limits.max_norm)
        check_sections(stream, header, shapes, limits)


def _read_header(stream: BinaryIO) -> bytes:
    """The header with the eight bytes that give its length."""
    length = stream.read(8)
    size = int.from_bytes(length, "little")
    if size > MAX_HEADER_BYTES:
        raise _refused(
            Reason.MALFORMED_PAYLOAD,
            f"The payload's header has {size} bytes; central reads at most {MAX_HEADER_BYTES}.",
        )
    return length + stream.read(size)


def _decode_layout(path: Path, header: bytes) -> LoraTensors:
    """What `protos.lora.decode` would return, with stand-ins that take no memory for the values."""
    try:
        # The same parser as decode's; it maps the file, and reads the header.
        with safe_open(path, framework="numpy") as payload:
            standins = {
                name: _standin(payload.get_slice(name).get_shape())
                for name in payload.keys()  # noqa: SIM118
            }
        return assemble(read_scales(header), standins)
    except (SafetensorError, LoraCodecError, ValueError) as error:
        raise _refused(Reason.MALFORMED_PAYLOAD, f"The payload is not a LoRA safetensors file: {error}.") from error


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


def _lora_entries(header: bytes) -> Entries:
    """What the safetensors header says of each factor; other tensors are left to the codec."""
    found: Entries = {}
    try:
        document: Any = json.loads(header[8:])
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
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError) as error:
        raise _refused(
            Reason.MALFORMED_PAYLOAD, f"The payload is not a readable safetensors file: {error!r}. See protos/lora.py."
        ) from error
    return found


def _refused(reason: Reason, message: str) -> Refused:
    status = grpc.StatusCode.INVALID_ARGUMENT
    if reason in (Reason.OTHER_BASE, Reason.UNKNOWN_START):
        status = grpc.StatusCode.FAILED_PRECONDITION
    return Refused(status, reason, message)
