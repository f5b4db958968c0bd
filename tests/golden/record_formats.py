"""Records what this software writes: `python -m tests.golden.record_formats <folder>`.

In: the folder of a version. Out: its folders wire/, backup/ and node/, which test_formats.py reads.
What is there already is never written again.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from central.backup.backup import back_up
from edge_node.experience import ExperienceStore, Feedback, Interaction
from edge_node.identity import Identity
from edge_node.outbox import Outbox
from edge_node.releases.store import ReleaseStore
from protos.base import BaseModelInfo
from protos.lora import LoraModule, LoraTensors, encode
from protos.manifest import Payload, ReleaseManifest, Start, UpdateManifest, sha256_hex, sign
from protos.releases.v1 import releases_pb2
from tests.contract.backup.builders import prepare

BASE = "b" * 64
SHAPES = {"model.layers.0.mlp.up_proj": (8, 4), "model.layers.0.self_attn.q_proj": (6, 4)}
"""Output and input features of each module."""
RANKS = (1, 2, 3)
AT = "2026-11-26T12:00:00.000000Z"


def payload(rank: int) -> bytes:
    """Factors of `rank`, and a section with arrays of several dtypes."""
    numbers = np.random.default_rng(rank)
    modules = {
        name: LoraModule(
            numbers.normal(size=(rank, columns)).astype(np.float32),
            numbers.normal(size=(rows, rank)).astype(np.float32),
            scale=0.5 * rank,
        )
        for name, (rows, columns) in SHAPES.items()
    }
    dtypes = ("float16", "float32", "float64", "int64", "uint8", "bool")
    section = {name: np.arange(4).astype(name) for name in dtypes}
    return encode(LoraTensors(modules, {"every_dtype": section} if rank == max(RANKS) else {}))


def update_manifest(data: bytes, rank: int) -> UpdateManifest:
    return UpdateManifest(
        node_id="node-a-00c0ffee",
        sequence=1,
        base=BASE,
        start=Start(release="1" * 64, payload="2" * 64, prefix_rank=0, dtype="bfloat16"),
        rank=rank,
        payload=Payload(digest_sha256=sha256_hex(data), size_bytes=len(data)),
        round_id="round-1",
        experiences=12,
        metrics={"loss": 0.25},
        created_at=AT,
        software="0.1.0",
    )


def release_manifest(data: bytes, rank: int) -> ReleaseManifest:
    return ReleaseManifest(
        base=BASE,
        cohort="shared",
        version=1,
        parent="3" * 64,
        plan="4" * 64,
        payload=Payload(digest_sha256=sha256_hex(data), size_bytes=len(data)),
        rank=rank,
        truncation_error=0.125,
        updates=["5" * 64],
        created_at=AT,
    )


def record_wire(folder: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Payloads of each rank; manifests with digest and signature; the public key."""
    folder.mkdir(parents=True)
    for rank in RANKS:
        (folder / f"rank{rank}.safetensors").write_bytes(payload(rank))
    data = payload(2)
    for name, document in (
        ("update", update_manifest(data, 2)),
        ("release", release_manifest(data, 2)),
    ):
        (folder / f"{name}.json").write_bytes(document.to_bytes())
        (folder / f"{name}.sha256").write_text(f"{document.digest}\n")
        (folder / f"{name}.sig").write_bytes(sign(key, document.to_bytes()))
    (folder / "signer.pub.pem").write_bytes(public(key))


def record_node(folder: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """What a node must still read after an upgrade: releases, outbox, experience."""
    data = payload(2)
    store = ReleaseStore(folder, identity(key), BaseModelInfo(folder, BASE, SHAPES))
    release = release_manifest(data, 2).to_bytes()
    signed = releases_pb2.SignedManifest(manifest=release, signature=sign(key, release))
    store.install(signed, data)
    store.keep_offer("offer-1", 8)
    store.keep_standing("odd labels")
    update = update_manifest(data, 2).to_bytes()
    Outbox(folder / "outbox", "manual").add("round-1", update, sign(key, update), data)
    experience = ExperienceStore(folder / "experience.db")
    experience.add_interactions([INTERACTION])
    experience.add_feedback(FEEDBACK, max_tokens=100)


INTERACTION = Interaction(
    id="chatcmpl-1",
    created_at=AT,
    model="lorikeet@v1-aaaaaaaa",
    messages=[{"role": "user", "content": "a question, ü"}],
    answer="wrong",
    finish_reason="stop",
    endpoint="/v1/chat/completions",
    prompt_ids=(1, 2**17),
    answer_ids=(3, 4),
)
FEEDBACK = Feedback("chatcmpl-1", 0.0, "right", "a remark", (5, 6))


def record_backup(folder: Path) -> None:
    """The backup of a small central with two nodes, two releases and one update set aside."""
    with tempfile.TemporaryDirectory() as scratch:
        prepared = asyncio.run(prepare(Path(scratch)))
        back_up(prepared.settings, folder, True, silent)


@contextmanager
def silent(digests: Iterable[str], count: int) -> Iterator[Iterable[str]]:
    """No progress bar."""
    yield digests


def identity(key: ec.EllipticCurvePrivateKey) -> Identity:
    """A node that trusts releases signed with `key`."""
    return Identity("node-a-00c0ffee", "shared", BASE, key, b"", b"", public(key))


def public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def main() -> None:
    """Records each folder; stops when one is there."""
    version = Path(sys.argv[1])
    there = [name for name in ("wire", "node", "backup") if (version / name).exists()]
    if there:
        sys.exit(f"{version} has {json.dumps(there)} already. A version is recorded once.")
    key = ec.generate_private_key(ec.SECP256R1())
    record_wire(version / "wire", key)
    record_node(version / "node", key)
    record_backup(version / "backup")


if __name__ == "__main__":
    main()
