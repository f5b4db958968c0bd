"""What an update must be before it is admitted: its manifest first, then its payload's file.

In: a manifest as sent with its signature; a payload's path. Out: nothing, or `Refused`, which
names what was wrong and what was expected. Guarantee: nothing is changed here. The header is
checked before any value.

A manifest stays in the journal and in memory for ever, and a header takes many times its size
while it is read. So both may be as long as the base's modules need, and no longer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from central.disk import storage
from central.errors import Reason, Refused
from central.intake.values import Entry, increment_norm, norm, read
from central.journal import NodeRecord, State
from central.merging.bounds import EMPTY, LEAST_NORM, excess
from central.settings import LimitSettings
from protos.encoding import DTYPES
from protos.lora import LoraCodecError, LoraModule, LoraTensors, assemble, scales_of
from protos.manifest import ManifestError, UpdateManifest, verify
from protos.rounding import block_count

MANIFEST_BYTES = 8 << 10
"""Bytes of a manifest without sections; a round's has 0.9 KiB."""
HEADER_BYTES = 4 << 10
SECTION_BYTES = 16
"""Bytes of one section's name in a manifest, without its module's name."""
ENTRY_BYTES = 144
"""Bytes of one tensor in a header, without its module's name: kind, dtype, shape, offsets."""
ENTRIES = 5
"""Entries per module: A, B and the scale, and room for the scales of int8."""
Shapes = Mapping[str, tuple[int, int]]
"""Out and in features of each linear module of the base model."""


Entries = dict[tuple[str, str], Entry]
"""The factors by module, and A or B."""


def manifest_bytes(modules: Iterable[str]) -> int:
    """Longest manifest of an update of a base with these linear modules."""
    return MANIFEST_BYTES + sum(SECTION_BYTES + len(name.encode()) for name in modules)


def header_bytes(modules: Iterable[str]) -> int:
    """Longest safetensors header of a payload for a base with these linear modules."""
    return HEADER_BYTES + sum(ENTRIES * (ENTRY_BYTES + len(name.encode())) for name in modules)


def check_signature(
    node: NodeRecord, manifest: bytes, signature: bytes, max_bytes: int
) -> UpdateManifest:
    """The manifest, if it is one and the node's key signed exactly these bytes.

    At most `max_bytes` are looked at. Raises Refused.
    """
    if len(manifest) > max_bytes:
        raise _refused(
            Reason.TOO_LARGE,
            f"The manifest has {len(manifest)} bytes; for this base central reads at most "
            f"{max_bytes}. Send fewer metrics.",
        )
    try:
        verify(node.public_key_pem.encode(), manifest, signature)
    except ManifestError as error:
        raise _refused(
            Reason.BAD_SIGNATURE,
            f"{error} Expected a signature by the key that node {node.node_id} enrolled.",
        ) from error
    try:
        document = UpdateManifest.from_bytes(manifest)
    except ManifestError as error:
        raise _refused(
            Reason.BAD_MANIFEST, f"{error} Expected protos.manifest.UpdateManifest."
        ) from error
    if document.node_id != node.node_id:
        raise _refused(
            Reason.BAD_MANIFEST,
            f"The manifest speaks for node {document.node_id}; the certificate is of "
            f"{node.node_id}.",
        )
    return document


def check_manifest(
    state: State, node: NodeRecord, manifest: UpdateManifest, base: str, limits: LimitSettings
) -> None:
    """Check all that can be checked before the payload is here; raises Refused."""
    name = f"Update {manifest.digest[:12]}"
    if manifest.base != base:
        raise _refused(
            Reason.OTHER_BASE,
            f"{name} was trained on base {manifest.base}; central's base is {base}.",
        )
    start = state.releases.get(manifest.start.release)
    # One answer to both: a node learns nothing of other cohorts' releases.
    if start is None or start.cohort != node.cohort:
        raise _refused(
            Reason.UNKNOWN_START,
            f"{name} starts from release {manifest.start.release}, which is not known in cohort "
            f"{node.cohort!r}.",
        )
    expected = start.manifest.payload.digest_sha256
    if manifest.start.payload != expected or manifest.start.prefix_rank > start.manifest.rank:
        raise _refused(
            Reason.UNKNOWN_START,
            f"{name} starts from payload {manifest.start.payload} with prefix rank "
            f"{manifest.start.prefix_rank}; release {start.manifest.label} has payload {expected} "
            f"and rank {start.manifest.rank}. Download the release again.",
        )
    if manifest.rank > limits.max_rank:
        raise _refused(
            Reason.RANK_TOO_LARGE,
            f"{name} has rank {manifest.rank}; central admits at most {limits.max_rank} "
            "(CENTRAL_LIMITS__MAX_RANK).",
        )
    if manifest.payload.size_bytes > limits.max_update_bytes:
        raise _refused(
            Reason.TOO_LARGE,
            f"{name} has {manifest.payload.size_bytes} bytes; central admits at most "
            f"{limits.max_update_bytes} (CENTRAL_LIMITS__MAX_UPDATE_BYTES).",
        )
    if manifest.sections:
        raise _refused(
            Reason.UNKNOWN_SECTION,
            f"{name} has section {min(manifest.sections)!r}; this central reads none. Leave it "
            "out, or upgrade central.",
        )


def check_payload(path: Path, manifest: UpdateManifest, shapes: Shapes, max_norm: float) -> None:
    """Check the complete payload at `path`, but for its digest.

    Raises Refused for what is wrong with it, and StorageError when the file cannot be read.
    """
    with storage(path), FileIO(path) as file:
        header = _read_header(file, header_bytes(shapes))
        document = _parse(header)
        entries = _lora_entries(document)
        tensors = _decode_layout(path, document, entries)
        _check_shapes(entries, manifest, shapes)
        _check_against_manifest(tensors, manifest)
        scales = {name: module.scale for name, module in tensors.modules.items()}
        _check_values(file, len(header), entries, scales, max_norm)


def _read_header(file: FileIO, max_bytes: int) -> bytes:
    """The header with the eight bytes of its length: what is before the values."""
    begin = file.read(8) or b""
    size = int.from_bytes(begin, "little")
    if len(begin) == 8 and size > max_bytes:
        raise _malformed(
            f"The payload's header has {size} bytes; for this base central reads at most "
            f"{max_bytes}."
        )
    header = begin + (file.read(size) or b"")
    if len(header) < 8 + size or len(begin) < 8:
        raise _malformed(
            f"The payload ends within its header, after {len(header)} bytes. See protos/lora.py."
        )
    if len(header) % 4:
        raise _malformed(
            f"The payload's header has {len(header)} bytes with its length; expected a multiple "
            "of 8, as safetensors' writers pad it."
        )
    return header


def _parse(header: bytes) -> dict[str, Any]:
    try:
        document = json.loads(header[8:])
        if isinstance(document, dict):
            return document
        raise ValueError(f"its header is a {type(document).__name__}")
    except (ValueError, RecursionError, MemoryError) as error:
        raise _malformed(
            f"The payload is not a readable safetensors file: {error!r}. See protos/lora.py."
        ) from error


def _lora_entries(document: Mapping[str, Any]) -> Entries:
    """What the header says of each factor; other tensors are left to the codec."""
    found: Entries = {}
    try:
        for name, entry in document.items():
            kind, _, rest = name.partition("/")
            module, _, factor = rest.rpartition("/")
            if kind == "lora" and factor in ("A", "B"):
                what, scales = f"Module {module!r} has {factor}", document.get(f"{name}_scales")
                found[module, factor] = _entry(what, entry, scales)
    except Refused:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise _malformed(
            f"The payload is not a readable safetensors file: {error!r}. See protos/lora.py."
        ) from error
    return found


def _entry(what: str, entry: Mapping[str, Any], scales: Mapping[str, Any] | None) -> Entry:
    dtype, shape, begin = str(entry["dtype"]), entry["shape"], int(entry["data_offsets"][0])
    if len(shape) != 2:
        raise _refused(Reason.BAD_SHAPE, f"{what} of shape {shape!r}; expected two dimensions.")
    found = Entry(dtype, (int(shape[0]), int(shape[1])), begin)
    if dtype != "I8":
        return found
    expected = {"dtype": "F32", "shape": [block_count(math.prod(found.shape))]}
    given = {key: scales[key] for key in expected} if scales is not None else None
    if scales is None or given != expected:
        raise _refused(
            Reason.BAD_SHAPE, f"{what} in int8 with scales {given}; expected {expected}."
        )
    return found._replace(scales=int(scales["data_offsets"][0]))


def _decode_layout(path: Path, document: Mapping[str, Any], entries: Entries) -> LoraTensors:
    """What `protos.lora.decode` would return, with stand-ins that take no memory for the values.

    decode reads the file with the same parser, so a later merge can read what passes here.
    """
    scaled = {f"lora/{m}/{f}_scales" for (m, f), entry in entries.items() if entry.dtype == "I8"}
    try:
        with safe_open(path, framework="numpy") as payload:
            standins = {
                name: _standin(payload.get_slice(name).get_shape())
                for name in payload.keys()  # noqa: SIM118
                if name not in scaled
            }
        return assemble(scales_of(document), standins)
    except (SafetensorError, LoraCodecError, ValueError) as error:
        raise _malformed(f"The payload is not a LoRA safetensors file: {error}.") from error


def _standin(shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """A float32 array of this shape that is one zero."""
    return np.broadcast_to(np.zeros((), np.float32), tuple(shape))


def _check_shapes(entries: Entries, manifest: UpdateManifest, shapes: Shapes) -> None:
    if not entries:
        raise _malformed("The payload has no LoRA factors; expected at least one module.")
    for (module, factor), (dtype, shape, *_) in entries.items():
        if module not in shapes:
            raise _refused(
                Reason.UNKNOWN_MODULE,
                f"Module {module!r} is not one that LoRA may target here; expected a linear "
                f"module of the base model, for example {next(iter(shapes), 'none')!r}.",
            )
        if dtype != (wanted := DTYPES[manifest.encoding]):
            raise _refused(
                Reason.BAD_DTYPE,
                f"Module {module!r} has {factor} in {dtype}; expected {manifest.encoding} "
                f"({wanted}), as the manifest says.",
            )
        out_features, in_features = shapes[module]
        rank, features = (shape[0], shape[1]) if factor == "A" else (shape[1], shape[0])
        expected = in_features if factor == "A" else out_features
        if features != expected or rank < 1:
            wanted = f"[rank, {in_features}]" if factor == "A" else f"[{out_features}, rank]"
            raise _refused(
                Reason.BAD_SHAPE,
                f"Module {module!r} has {factor} of shape {shape}; expected {wanted}.",
            )
        if rank > manifest.rank:
            raise _refused(
                Reason.RANK_TOO_LARGE,
                f"Module {module!r} has rank {rank}; the manifest says at most {manifest.rank}.",
            )


def _check_against_manifest(tensors: LoraTensors, manifest: UpdateManifest) -> None:
    if tensors.rank != manifest.rank:
        raise _refused(
            Reason.BAD_SHAPE,
            f"Largest rank is {tensors.rank}; the manifest says {manifest.rank}.",
        )
    if (sections := sorted(tensors.sections)) != manifest.sections:
        raise _refused(
            Reason.UNKNOWN_SECTION,
            f"Sections are {sections}; the manifest says {manifest.sections}.",
        )


def _check_values(
    file: FileIO, start: int, entries: Entries, scales: Mapping[str, float], max_norm: float
) -> None:
    """Check that every value is finite, nothing is too large, and not all increments are zero.

    ||scale * B A||_F <= |scale| ||B||_F ||A||_F shows that nearly every increment is small enough.
    Only where it does not, the module is read as a whole and its norm computed. A small product may
    hide an extreme scale, so scale and factors have bounds of their own.
    """
    largest = 0.0
    for name, scale in scales.items():
        a, b = entries[name, "A"], entries[name, "B"]
        norm_a, norm_b = norm(file, start, a), norm(file, start, b)
        if not (math.isfinite(norm_a) and math.isfinite(norm_b)):
            raise _refused(
                Reason.NOT_FINITE,
                f"Module {name!r} has NaN or infinite values; expected finite numbers.",
            )
        if text := excess(name, scale, norm_a, norm_b):
            raise _refused(
                Reason.NORM_OUT_OF_BOUNDS,
                f"{text} Train with a smaller learning rate or lora_alpha.",
            )
        bound = abs(scale) * norm_a * norm_b
        if bound > max_norm:
            module = LoraModule(read(file, start, a), read(file, start, b), scale)
            _check_norm(name, increment_norm(module), max_norm)
        largest = max(largest, bound)
    if not largest > LEAST_NORM:
        raise _refused(
            Reason.NORM_OUT_OF_BOUNDS,
            f"{EMPTY} The round learnt nothing: raise its learning rate, or send what a later "
            "round learns.",
        )


def _check_norm(name: str, norm: float, max_norm: float) -> None:
    if not norm <= max_norm:
        raise _refused(
            Reason.NORM_OUT_OF_BOUNDS,
            f"Module {name!r} has an increment of norm {norm:g}; central admits at most "
            f"{max_norm:g} (CENTRAL_LIMITS__MAX_NORM).",
        )


def _malformed(message: str) -> Refused:
    return _refused(Reason.MALFORMED_PAYLOAD, message)


def _refused(reason: Reason, message: str) -> Refused:
    status = grpc.StatusCode.INVALID_ARGUMENT
    if reason in (Reason.OTHER_BASE, Reason.UNKNOWN_START):
        status = grpc.StatusCode.FAILED_PRECONDITION
    return Refused(status, reason, message)
