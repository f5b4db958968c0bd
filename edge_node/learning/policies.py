"""The learner's policies in vLLM: release and increment as one adapter, a version for each step.

In: the start release, an increment. Out: the name under which vLLM serves their sum. Guarantees: a
version is an immutable directory with a name that was never used before; its directory is deleted
only after vLLM has forgotten it; clients do not see it (edge_node/serving/aliases.py).

P = release + increment is one LoRA of the factors set side by side, exact: B_r A_r + s B_i A_i =
[B_r, s B_i] [A_r; A_i]. Its rank is the sum of both.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from edge_node.releases.peft_directory import peft_files
from edge_node.serving import ControlClient
from edge_node.serving.aliases import PRIVATE
from protos.lora import LoraModule, LoraTensors

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def read_release(folder: Path) -> LoraTensors:
    """Factors of a release's PEFT directory, whose scale is 1."""
    arrays = load_file(folder / "adapter_model.safetensors")
    return LoraTensors(
        {
            key.removeprefix(_PREFIX).removesuffix(_A): LoraModule(
                arrays[key], arrays[key.removesuffix(_A) + _B]
            )
            for key in arrays
            if key.endswith(_A)
        }
    )


def side_by_side(release: LoraTensors, increment: LoraTensors) -> LoraTensors:
    """The sum of both as one adapter of scale 1; float32 A [R + r, in], B [out, R + r]."""
    modules = dict(release.modules)
    for name, added in increment.modules.items():
        b = added.B * np.float32(added.scale)
        start = modules.get(name)
        modules[name] = (
            LoraModule(added.A, b)
            if start is None
            else LoraModule(
                np.concatenate([start.A, added.A]),
                np.concatenate([start.B * np.float32(start.scale), b], axis=1),
            )
        )
    return LoraTensors(modules)


class Policies:
    """Owner of `learning/policies`; one for each run of a round."""

    def __init__(
        self,
        folder: Path,
        control: ControlClient,
        round_id: str,
        release: LoraTensors,
        shapes: Mapping[str, tuple[int, int]],
    ) -> None:
        """shapes: the base's linear modules, name -> (out_features, in_features)."""
        # A resumed round may come to other bytes on a GPU, and vLLM keeps prefixes by name.
        self._run = f"{round_id}.{secrets.token_hex(4)}"
        self._folder = folder
        self._control = control
        self._release = release
        self._shapes = shapes

    async def publish(self, step: int, increment: LoraTensors) -> str:
        """Serves the sum of release and `increment`, and unloads the policy before it; idempotent.

        Raises ServingError.
        """
        name = f"{PRIVATE}{self._run}@{step}"
        path = self._folder / self._run / str(step)
        if not path.is_dir():
            files = peft_files(side_by_side(self._release, increment), self._shapes)
            await asyncio.to_thread(_write, path, files)
        await self._control.load(name, path)
        await sweep(self._folder, self._control, keep=name)
        return name


async def sweep(folder: Path, control: ControlClient, keep: str = "") -> None:
    """Unloads every policy but `keep`, also those of a killed learner, and deletes its directory.

    Raises ServingError; what is still loaded then is still on disk.
    """
    loaded = (await control.state()).loaded
    for name in loaded:
        if name.startswith(PRIVATE) and name != keep:
            await control.unload(name)
    kept = loaded.get(keep)
    for path in folder.glob("*/*"):
        if path != kept:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
    for run in folder.glob("*"):
        if not any(run.iterdir()):
            run.rmdir()


def _write(path: Path, files: Mapping[str, bytes]) -> None:
    """Whole when it has its name. Nothing is forced to disk: no policy outlives a power cut."""
    partial = path.with_name(f".{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in files.items():
        (partial / name).write_bytes(content)
    partial.rename(path)
