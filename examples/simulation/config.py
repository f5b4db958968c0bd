"""What a run of the simulation is made of, read from Flower's run config by both apps.

In: the run config (pyproject.toml, `--run-config`). Out: settings of central and of a virtual node.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from central.cohort.planning import least_updates
from central.settings import CentralSettings
from edge_node.settings import EdgeSettings
from examples.quickstart.model import build_base
from examples.quickstart.recipe import LEARNING

SMALL = {"batch_own": 8, "batch_hard": 0, "batch_anchor": 8, "anchor_pool": 300}
"""What differs from the quickstart's recipe, so that 50 rounds of a node fit on a small machine."""
ANCHOR_TOLERANCE_POINTS = 10.0
"""The first mean of so many short rounds costs a few points of base skill.

The second mean brings them back.
"""
LETTERS = "ABC"
"""Virtual nodes take turns in these parts of acme's work (examples/quickstart/environments.py)."""
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "quickstart"
"""Where the quickstart keeps its base model."""
ENVIRONMENTS = "examples.quickstart.environments"


@dataclass(frozen=True)
class SimulationConfig:
    """The run config with its types; the keys are those of pyproject.toml."""

    rounds: int
    nodes_per_round: int
    examples: int
    steps: int
    tasks: int
    strategy: str
    strategy_options: dict[str, Any]
    rank: int
    server_step: float
    seed: int
    folder: Path

    @classmethod
    def read(cls, run_config: Mapping[str, Any]) -> SimulationConfig:
        """Raises ValueError naming the key."""
        values: dict[str, Any] = {}
        for name, kind in (
            ("rounds", int), ("nodes-per-round", int), ("examples", int), ("steps", int),
            ("tasks", int), ("strategy", str),
            ("strategy-options", json.loads), ("rank", int), ("server-step", float), ("seed", int),
            ("folder", Path),
        ):  # fmt: skip
            try:
                values[name.replace("-", "_")] = kind(run_config[name])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"Run config {name!r} is {run_config.get(name)!r}: {error!r}."
                ) from error
        return cls(**{**values, "folder": values["folder"].absolute()})

    def central(self, run_id: int) -> CentralSettings:
        """Central's settings; each run has a data directory of its own.

        The gate takes one look, and no search follows a rejection.
        """
        return CentralSettings(
            data_dir=self.folder / f"central-{run_id}",
            merge={
                "min_updates": least_updates(self.strategy, self.strategy_options),
                "strategy": self.strategy,
                "strategy_options": self.strategy_options,
                "rank": self.rank,
                "server_step": self.server_step,
                "seed": self.seed,
            },
            gate={
                "tasks": self.tasks,
                "max_tasks": self.tasks,
                "anchor_tolerance_points": ANCHOR_TOLERANCE_POINTS,
                "isolation_tries": 0,
            },
        )

    def node(self, partition: int) -> EdgeSettings:
        """A virtual node's settings."""
        letter = LETTERS[partition % len(LETTERS)]
        recipe = {
            key.removeprefix("EDGE_LEARNING__").lower(): value for key, value in LEARNING.items()
        }
        return EdgeSettings(
            data_dir=self.folder / "nodes" / f"{self.seed}-{self.examples}" / str(partition),
            base={"path": build_base(CACHE)},
            environments=[
                {
                    "name": f"acme-{letter.lower()}",
                    "factory": f"{ENVIRONMENTS}:CompanyApi",
                    "options": {"node": letter, "seed": self.seed},
                },
                {"name": "public", "factory": f"{ENVIRONMENTS}:PublicTenants", "anchor": True},
            ],
            learning={
                **recipe,
                **SMALL,
                "steps": self.steps,
                "seed": self.seed,
                "checkpoint_steps": 1000,
            },
        )
