"""A node's vLLM on CPU with releases of the tiny model, its proof, and faults on demand.

In: releases by seed. Out: the running server, whose engine does to the next adapter what the file
`fault` says (tests/fakes/engine_faults.py).
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_node.identity import Identity
from edge_node.proof.proof import Proof
from edge_node.proof.reckoner import Reckoner
from edge_node.proof.references import References
from edge_node.releases.store import ReleaseStore, StoredRelease
from edge_node.serving import ControlClient, VllmProcess
from edge_node.settings import BaseModelSettings, EdgeSettings, ReleasesSettings, ServingSettings
from examples.ports import free_port
from protos.base import BaseModelInfo, read_base_model
from protos.lora import LoraTensors, encode
from tests.fakes.signed_releases import make_signed
from tests.fakes.tiny_model import POSITIONS, tiny_model

ROOT = str(Path(__file__).parents[2])
FAULTS = "lorikeet_test_faults"
ENTRY_POINTS = f"[vllm.general_plugins]\n{FAULTS} = tests.fakes.engine_faults:install\n"


@dataclass
class ProvingNode:
    """`proof` compares with the base that vLLM serves; `fault` is what the engine does wrong."""

    vllm: VllmProcess
    control: ControlClient
    http: httpx.AsyncClient
    store: ReleaseStore
    base: BaseModelInfo
    reckoner: Reckoner
    proof: Proof
    data_dir: Path
    key: ec.EllipticCurvePrivateKey

    @property
    def fault_file(self) -> Path:
        return self.data_dir / "fault"

    def release(self, tensors: LoraTensors, **changes: Any) -> StoredRelease:
        payload = encode(tensors)
        signed = make_signed(self.key, payload, base=self.base.digest, rank=tensors.rank, **changes)
        return self.store.install(signed, payload)

    def references(self, base: BaseModelInfo) -> References:
        return References(self.data_dir, base, self.reckoner, POSITIONS)

    async def serve(self, release: StoredRelease) -> str:
        """Proves a release and points the alias at it."""
        name = f"lorikeet@{release.label}"
        await self.proof.load(name, release)
        await self.proof.expect(name, release, None)
        await self.control.point(name)
        return name


@asynccontextmanager
async def proving_node(environment: Mapping[str, str] | None = None) -> AsyncIterator[ProvingNode]:
    with tempfile.TemporaryDirectory(prefix="lk-") as directory:  # short enough for a socket path
        data_dir, port = Path(directory), free_port()
        plugins = data_dir / "plugins"
        about = plugins / f"{FAULTS}-1.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {FAULTS}\nVersion: 1\n")
        (about / "entry_points.txt").write_text(ENTRY_POINTS)
        settings = EdgeSettings(
            data_dir=data_dir,
            base=BaseModelSettings(path=tiny_model()),
            serving=ServingSettings(port=port),
            releases=ReleasesSettings(),
        )
        base, key = (
            read_base_model(tiny_model(), memory=data_dir),
            ec.generate_private_key(ec.SECP256R1()),
        )
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        identity = Identity("n-1", "shared", base.digest, key, b"", b"", public)
        store = ReleaseStore(data_dir, identity, base)
        vllm = VllmProcess(settings, base, data_dir / "control.sock")
        control, reckoner = ControlClient(data_dir / "control.sock"), Reckoner()
        proof = Proof(
            data_dir, store, control, References(data_dir, base, reckoner, POSITIONS), reckoner
        )
        variables = {
            "PYTHONPATH": os.pathsep.join([str(plugins), ROOT, os.environ.get("PYTHONPATH", "")]),
            "VLLM_PLUGINS": FAULTS,
            "LORIKEET_TEST_FAULT": str(data_dir / "fault"),
        }
        with patch.dict(os.environ, variables | dict(environment or {})):
            running = asyncio.create_task(vllm.run())
            try:
                await vllm.wait_ready()
                async with httpx.AsyncClient(
                    base_url=f"http://127.0.0.1:{port}", timeout=60
                ) as http:
                    yield ProvingNode(
                        vllm, control, http, store, base, reckoner, proof, data_dir, key
                    )
            finally:
                await proof.aclose()
                await vllm.aclose()
                await running
