"""Where a round trains, and who is asked and told meanwhile: what rounds of every method share.

In: settings, a plan, a folder for checkpoints. Out: a Workplace. Loads no torch, but in
`find_workplace`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from edge_node.base_model import read_base
from edge_node.learning.compute import PLAIN, Compute, read_compute
from edge_node.learning.plans import RoundPlan
from edge_node.learning.steering import UNSTEERED, Steering
from edge_node.learning.targets import targeted
from edge_node.settings import EdgeSettings


def _never() -> bool:
    return False


def _nobody() -> None:
    pass


@dataclass(frozen=True)
class Workplace:
    """What a round needs beside its plan and what it learns from."""

    base: Path
    """Directory of the base model."""
    release: Path | None
    """PEFT directory of the start release; None for one without modules (version 0)."""
    folder: Path
    """Of the checkpoints; a round goes on from the newest valid one in it."""
    served: Path | None = None
    """PEFT directory from which vLLM serves the start release, also one without modules; None
    where no vLLM is asked.
    """
    modules: Collection[str] | None = None
    """Names of the base's modules to train; all of them when None."""
    compute: Compute = PLAIN
    obsolete: Callable[[], bool] = _never
    """Asked after each step: whether the update would be of no use any more."""
    beat: Callable[[], None] = _nobody
    """Called when the model is loaded, and in each layer of a step, forward and backward."""
    steering: Steering = UNSTEERED
    """Asked and told between steps."""


def find_workplace(
    plan: RoundPlan,
    settings: EdgeSettings,
    release: Path,
    folder: Path,
    *,
    obsolete: Callable[[], bool] = _never,
    beat: Callable[[], None] = _nobody,
    steering: Steering = UNSTEERED,
) -> Workplace:
    """The workplace of `plan` on this node.

    Args:
        release: PEFT directory of the start release, of one without modules too.

    Raises:
        SettingsError: no base model, modules or a GPU that are not there.
    """
    beat()
    base = read_base(settings)
    beat()
    return Workplace(
        base=base.path,
        release=release if plan.release_rank else None,
        folder=folder,
        served=release,
        modules=targeted(plan.target_modules, base.module_shapes),
        compute=read_compute(settings.learning),
        obsolete=obsolete,
        beat=beat,
        steering=steering,
    )
