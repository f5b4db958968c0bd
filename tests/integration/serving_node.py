"""A node's vLLM on CPU without the rest of the node: the tiny model and its adapters.

In: adapters by seed and rank. Out: the running server with the alias on the first adapter; stopped
at the end.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from edge_node.serving import ControlClient, VllmProcess
from edge_node.settings import BaseModelSettings, EdgeSettings, ServingSettings
from examples.ports import free_port
from protos.base import read_base_model
from tests.fakes.tiny_model import tiny_adapter, tiny_model, write_peft

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass
class ServingNode:
    """`versions` are the loaded adapters in the order of their slots."""

    vllm: VllmProcess
    control: ControlClient
    http: httpx.AsyncClient
    base: str
    versions: list[str]
    log: Path

    def directory(self, version: str) -> Path:
        """The PEFT directory of a loaded adapter."""
        return self.log.parents[1] / "releases" / "versions" / version

    async def text(self, prompt: str, model: str) -> str:
        """The greedy completion of 12 tokens."""
        body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0}
        answer = await self.http.post(COMPLETIONS, json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])


@asynccontextmanager
async def serving_node(
    ranks: Mapping[int, int], extra_args: Sequence[str] = (), **serving: Any
) -> AsyncIterator[ServingNode]:
    """One adapter for each seed in `ranks`, of that rank; OMP_NUM_THREADS is the caller's."""
    with tempfile.TemporaryDirectory(prefix="lk-") as directory:  # short enough for a socket path
        data_dir, port = Path(directory), free_port()
        settings = EdgeSettings(
            data_dir=data_dir,
            base=BaseModelSettings(path=tiny_model()),
            serving=ServingSettings(port=port, extra_args=list(extra_args), **serving),
        )
        vllm = VllmProcess(settings, read_base_model(tiny_model()), data_dir / "control.sock")
        control = ControlClient(data_dir / "control.sock")
        running = asyncio.create_task(vllm.run())
        try:
            await vllm.wait_ready()
            versions = [f"lorikeet@v{seed}-{seed:08d}" for seed in ranks]
            for (seed, rank), version in zip(ranks.items(), versions, strict=True):
                adapter = tiny_adapter(seed, rank=rank)
                await control.load(
                    version, write_peft(adapter, data_dir / "releases" / "versions" / version)
                )
            await control.point(versions[0])
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                base = (await control.state()).base
                yield ServingNode(
                    vllm, control, http, base, versions, data_dir / "logs" / "vllm.log"
                )
        finally:
            await vllm.aclose()
            await running
