"""Releases as central signs them, of a base with two small modules."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from protos.lora import LoraModule, LoraTensors, encode
from protos.manifest import Payload, ReleaseManifest, sha256_hex, sign
from protos.releases.v1 import releases_pb2

BASE = "b" * 64
SHAPES = {"model.layers.0.self_attn.q_proj": (6, 4), "model.layers.0.mlp.up_proj": (8, 4)}


def make_payload(rank: int = 2) -> bytes:
    rng = np.random.default_rng(0)
    modules = {
        name: LoraModule(
            rng.normal(size=(rank + i, shape[1])).astype(np.float32),
            rng.normal(size=(shape[0], rank + i)).astype(np.float32),
            scale=0.5,
        )
        for i, (name, shape) in enumerate(sorted(SHAPES.items()))
    }
    return encode(LoraTensors(modules))


def make_signed(
    key: ec.EllipticCurvePrivateKey, payload: bytes, **changes: object
) -> releases_pb2.SignedManifest:
    fields: dict[str, object] = {
        "base": BASE,
        "cohort": "shared",
        "version": 1,
        "parent": "a" * 64,
        "plan": "c" * 64,
        "payload": Payload(digest_sha256=sha256_hex(payload), size_bytes=len(payload)),
        "rank": 3,
        "truncation_error": 0.0,
        "updates": [],
        "created_at": "2026-01-01T00:00:00Z",
    }
    data = ReleaseManifest.model_validate(fields | changes).to_bytes()
    return releases_pb2.SignedManifest(manifest=data, signature=sign(key, data))
