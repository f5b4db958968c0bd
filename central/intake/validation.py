"""What an update must be before it is admitted: its manifest first, then its payload.

In: a manifest as sent with its signature; later the payload's bytes. Out: nothing, or `Refused` that names what was
wrong and what was expected. Guarantee: nothing is changed here. Headers are checked before tensors are loaded, so that
a bad shape costs no memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np

from central.errors import Reason, Refused
from central.journal import NodeRecord, State
from central.settings import LimitSettings
from protos.lora import LoraCodecError, LoraModule, decode
from protos.manifest import ManifestError, UpdateManifest, verify

KNOWN_SECTIONS: frozenset[str] = frozenset()
"""Named sections that a merge rule of this software reads. The exact product mean reads none."""
MAX_MANIFEST_BYTES = 64 << 10
MAX_HEADER_BYTES = 8 << 20
"""Of a payload's safetensors header; parsed, it takes many times as much memory."""
Shapes = Mapping[str, tuple[int, int]]


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
    unknown = sorted(set(manifest.sections) - KNOWN_SECTIONS)
    if unknown:
        raise _refused(
            Reason.UNKNOWN_SECTION,
            f"{name} has section {unknown[0]!r}; this central reads {sorted(KNOWN_SECTIONS) or 'none'}. "
            "Leave it out, or upgrade central.",
        )


def check_payload(data: bytes, manifest: UpdateManifest, shapes: Shapes, limits: LimitSettings) -> None:
    """The payload's structure, then its values. Uses CPU: call it off the event loop."""
    _check_header(data, manifest, shapes)
    try:
        tensors = decode(data)
    except LoraCodecError as error:
        raise _refused(Reason.MALFORMED_PAYLOAD, str(error)) from error
    if tensors.rank != manifest.rank:
        raise _refused(Reason.BAD_SHAPE, f"Largest rank is {tensors.rank}; the manifest says {manifest.rank}.")
    if sorted(tensors.sections) != manifest.sections:
        raise _refused(
            Reason.UNKNOWN_SECTION, f"Sections are {sorted(tensors.sections)}; the manifest says {manifest.sections}."
        )
    for name, module in tensors.modules.items():
        _check_values(name, module, limits.max_norm)


def _check_header(data: bytes, manifest: UpdateManifest, shapes: Shapes) -> None:
    entries = _lora_entries(data)
    if not entries:
        raise _refused(Reason.MALFORMED_PAYLOAD, "The payload has no LoRA factors; expected at least one module.")
    for (module, factor), (dtype, shape) in entries.items():
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


def _lora_entries(data: bytes) -> dict[tuple[str, str], tuple[str, tuple[int, int]]]:
    """(module, A or B) -> dtype and shape, as the safetensors header says; other tensors are left to the codec."""
    found: dict[tuple[str, str], tuple[str, tuple[int, int]]] = {}
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER_BYTES:
        raise _refused(
            Reason.MALFORMED_PAYLOAD,
            f"The payload's header has {size} bytes; central reads at most {MAX_HEADER_BYTES}.",
        )
    try:
        header: Any = json.loads(data[8 : 8 + size])
        for name, entry in header.items():
            kind, _, rest = name.partition("/")
            module, _, factor = rest.rpartition("/")
            if kind == "lora" and factor in ("A", "B"):
                shape = entry["shape"]
                if len(shape) != 2:
                    raise _refused(
                        Reason.BAD_SHAPE, f"Module {module!r} has {factor} of shape {shape}; expected two dimensions."
                    )
                found[module, factor] = (str(entry["dtype"]), (int(shape[0]), int(shape[1])))
    except Refused:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError) as error:
        raise _refused(
            Reason.MALFORMED_PAYLOAD, f"The payload is not a readable safetensors file: {error!r}. See protos/lora.py."
        ) from error
    return found


def _check_values(name: str, module: LoraModule, max_norm: float) -> None:
    if not (np.isfinite(module.A).all() and np.isfinite(module.B).all()):
        raise _refused(Reason.NOT_FINITE, f"Module {name!r} has NaN or infinite values; expected finite numbers.")
    norm = increment_norm(module)
    if not norm <= max_norm:
        raise _refused(
            Reason.NORM_OUT_OF_BOUNDS,
            f"Module {name!r} has an increment of norm {norm:g}; central admits at most {max_norm:g} "
            "(CENTRAL_LIMITS__MAX_NORM).",
        )


def increment_norm(module: LoraModule) -> float:
    """||scale * B @ A||_F from the rank x rank Grams (float64), never from the dense product."""
    a = module.A.astype(np.float64)
    b = module.B.astype(np.float64)
    squared = float(np.sum((b.T @ b) * (a @ a.T)))
    return abs(module.scale) * float(np.sqrt(max(squared, 0.0)))


def _refused(reason: Reason, message: str) -> Refused:
    status = grpc.StatusCode.INVALID_ARGUMENT
    if reason in (Reason.OTHER_BASE, Reason.UNKNOWN_START):
        status = grpc.StatusCode.FAILED_PRECONDITION
    return Refused(status, reason, message)
