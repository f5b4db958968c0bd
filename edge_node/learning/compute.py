"""On what a node trains, and in which type: the device, bfloat16, memory for time.

In: LearningSettings, the base. Out: a Compute, a dtype, or SettingsError. Torch is imported only
where a round is near; elsewhere a process of its own is asked.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from edge_node.errors import SettingsError
from edge_node.settings import LearningSettings
from protos.base import read_layout
from protos.checkpoint import read_tensors

BFLOAT16_FROM = 50_000_000
"""Parameters from which "auto" is bfloat16. A model of 135 million trained 1.5 times faster with it
on a CPU that has it; a tiny one spends its time elsewhere.
"""
ASK_TIMEOUT_S = 120.0
_ASK = (
    "import torch; print(torch.cuda.get_device_properties(0).total_memory "
    "if torch.cuda.is_available() else 0)"
)


@dataclass(frozen=True)
class Compute:
    """How this machine trains.

    It changes an update by float rounding alone. So it is no part of a plan: a round that ran out
    of memory goes on with settings that need less.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    gradient_checkpointing: bool = False
    batch_tokens: int | None = None


PLAIN = Compute()


def read_compute(settings: LearningSettings) -> Compute:
    """For the learner itself: loads torch. Raises SettingsError for a GPU that is not there."""
    from torch import cuda

    device = choose_device(settings.device, cuda.is_available)
    return Compute(device, settings.gradient_checkpointing, settings.batch_tokens)


def choose_device(setting: str, cuda_is_seen: Callable[[], object]) -> Literal["cpu", "cuda"]:
    """Raises SettingsError for "cuda" where torch sees none; "cpu" asks nothing."""
    if setting == "cpu":
        return "cpu"
    if cuda_is_seen():
        return "cuda"
    if setting == "auto":
        return "cpu"
    raise SettingsError(
        "EDGE_LEARNING__DEVICE is 'cuda', and torch sees no CUDA device here (torch "
        f"{_torch_version()}). Expected a GPU with its driver, a torch that was built for it, and "
        "no CUDA_VISIBLE_DEVICES that hides it. Mend that, or set the variable to auto."
    )


def cuda_bytes() -> int:
    """Memory of the first GPU that torch sees; 0 without one. Blocks for seconds; loads no torch
    into this process, and asks nobody where torch was built for CPU.
    """
    if _torch_version().endswith("+cpu"):
        return 0
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _ASK],
            capture_output=True,
            text=True,
            timeout=ASK_TIMEOUT_S,
        )
        return int(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return 0


def training_dtype(setting: str, parameters: int) -> Literal["float32", "bfloat16"]:
    """`setting`, where "auto" is bfloat16 from BFLOAT16_FROM parameters on."""
    if setting == "bfloat16" or (setting == "auto" and parameters >= BFLOAT16_FROM):
        return "bfloat16"
    return "float32"


def count_parameters(base: Path) -> int:
    """Of the base's text model, by the headers of its files; raises BaseModelError, OSError."""
    layout = read_layout(base)
    return sum(
        math.prod(tensor.shape)
        for name, tensor in read_tensors(base, layout.files).items()
        if name.startswith(layout.wrapper_prefix) or "lm_head" in name
    )


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "is not installed"
