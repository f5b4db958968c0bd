"""A Gateway over an engine that only remembers what it was told: all but vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from edge_node.errors import ServingError
from edge_node.serving.gateway import Gateway
from edge_node.serving.held import Held
from edge_node.settings import BaseModelSettings, EdgeSettings

MODULE = "model.layers.0.self_attn.q_proj"


class Letters:
    """Satisfies capture.Texts: an id is a character."""

    def text(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def ids(self, text: str) -> list[int]:
        return list(map(ord, text))

    def pieces(self, ids: Sequence[int]) -> list[tuple[str, int]]:
        return [(chr(token), 1) for token in ids]


class RecordingEngine:
    """Satisfies gateway.EngineLike."""

    def __init__(self) -> None:
        self.base_name = "base@01234567"
        self.max_model_len = 512
        self.longest_text = 4096
        self.errored = False
        self.texts = Letters()
        self.loaded: dict[str, Path] = {}
        self.refuse: str | None = None
        self.wrong: dict[str, str] = {}
        """What its workers do not hold, by module."""

    async def load(self, name: str, path: Path) -> None:
        if self.refuse is not None:
            raise ServingError(self.refuse)
        self.loaded[name] = path

    async def unload(self, name: str) -> None:
        del self.loaded[name]

    async def held(self, name: str, path: Path) -> Held:
        return Held(modules=1, wrong=dict(self.wrong))

    def stop_listening(self) -> None:
        return None

    async def probe(self) -> None:
        return None

    def answer_ids(self, text: str) -> list[int] | None:
        """One id a letter, and 0 at the end."""
        return None if len(text) > self.max_model_len else [*map(ord, text), 0]

    def calls_ids(self, calls: list[dict[str, Any]]) -> list[int]:
        """Those of their names; a model that knows no `unknown`."""
        names = [call["function"]["name"] for call in calls]
        if "unknown" in names:
            raise ValueError("The chat template of this model shows no tool calls.")
        return [*map(ord, " ".join(names)), 0]


def make_gateway(data_dir: Path) -> Gateway:
    base = data_dir / "base"
    base.mkdir(parents=True, exist_ok=True)
    save_file({f"{MODULE}.weight": np.zeros((6, 4), np.float32)}, base / "model.safetensors")
    return Gateway(
        EdgeSettings(data_dir=data_dir, base=BaseModelSettings(path=base)), RecordingEngine()
    )


def make_version(root: Path, label: str, *, module: str = MODULE, columns: int = 4) -> Path:
    """A PEFT directory for the base of make_gateway, unless told otherwise."""
    path = root / label
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    factors = {"A": np.zeros((2, columns), np.float32), "B": np.zeros((6, 2), np.float32)}
    save_file(
        {f"base_model.model.{module}.lora_{side}.weight": array for side, array in factors.items()},
        path / "adapter_model.safetensors",
    )
    return path
