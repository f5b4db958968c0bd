"""A node's vLLM behind keys, on the model that can spell, as clients of every kind find it.

In: nothing. Out: the running server with the alias on one version, a key, and a metrics port;
stopped at the end.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_node.access import Scope, create_key, keys_file
from edge_node.experience import ExperienceStore
from edge_node.serving import ControlClient, VllmProcess, control_socket
from edge_node.serving_settings import LimitsSettings
from edge_node.settings import BaseModelSettings, EdgeSettings, ServingSettings
from examples.ports import free_port
from protos.base import read_base_model
from protos.lora import LoraTensors
from tests.fakes.talking_model import talking_model
from tests.fakes.tiny_model import write_peft

V1, ALIAS = "lorikeet@v1-11111111", "lorikeet"
PARSERS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
"""What an operator sets for tool calls; the parser is the model family's."""
PROMPT_TOKENS, CHOICES = 1500, 4
"""Bounds of this node."""


@dataclass
class TalkingNode:
    settings: EdgeSettings
    control: ControlClient
    vllm: VllmProcess
    key: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.serving.port}"

    def kept(self, answer_id: str) -> Any:
        store = ExperienceStore(self.settings.data_dir / "experience.db")
        try:
            return store.interaction(answer_id)
        finally:
            store.close()


@asynccontextmanager
async def talking_node() -> AsyncIterator[TalkingNode]:
    """OMP_NUM_THREADS is the caller's."""
    with tempfile.TemporaryDirectory(prefix="lk-") as directory:
        settings = EdgeSettings(
            data_dir=Path(directory),
            base=BaseModelSettings(path=talking_model()),
            serving=ServingSettings(
                port=free_port(),
                metrics_port=free_port(),
                access="required",
                extra_args=PARSERS,
                limits=LimitsSettings(prompt_tokens=PROMPT_TOKENS, choices=CHOICES),
            ),
        )
        key = create_key(keys_file(settings), "app", [Scope.INFER, Scope.FEEDBACK], None)
        socket = control_socket(settings.data_dir)
        vllm = VllmProcess(settings, read_base_model(talking_model()), socket)
        control = ControlClient(socket)
        running = asyncio.create_task(vllm.run())
        try:
            await vllm.wait_ready()
            versions = settings.data_dir / "releases" / "versions"
            await control.load(V1, write_peft(LoraTensors(), versions / "v1"))
            await control.point(V1)
            yield TalkingNode(settings, control, vllm, key)
        finally:
            await vllm.aclose()
            await running
