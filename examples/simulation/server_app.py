"""Central's ServerApp with Flower's virtual nodes: prints a line per round, writes results.

In: the run config and Flower's Grid. Out: `<folder>/report.json`, `<folder>/plot.png` and central's
data directory.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from central.cohort.simulation import Round, simulate
from examples.quickstart.model import build_base
from examples.simulation.config import CACHE, SimulationConfig
from examples.simulation.plot import write_plot
from protos.base import read_base_model

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the simulation of this run config."""
    config = SimulationConfig.read(context.run_config)
    base = build_base(
        CACHE,
        lambda step, steps: _say(f"base model: {step}/{steps} steps") if step % 100 == 0 else None,
    )
    settings = config.central(context.run_id)
    nodes = len(list(grid.get_node_ids()))
    _say(
        f"{nodes} virtual nodes, {config.rounds} rounds, {config.strategy}; "
        f"results in {config.folder}"
    )
    watcher = _Printer(config, nodes)
    simulate(
        grid,
        context,
        settings,
        read_base_model(base).digest,
        config.rounds,
        config.nodes_per_round,
        watcher,
    )
    watcher.finish(settings.data_dir)


class _Printer:
    """Says how it goes, and keeps what the report needs."""

    def __init__(self, config: SimulationConfig, nodes: int) -> None:
        self._config = config
        self._nodes = nodes
        self._begun = time.monotonic()
        self._rounds: list[Round] = []

    def on_progress(self, number: int, message_type: str, replied: int, asked: int) -> None:
        if replied == asked or replied % 10 == 0:
            done = "trained" if message_type == "train" else "judged"
            _say(
                f"round {number}/{self._config.rounds}: {replied} of {asked} nodes {done}, "
                f"{self._elapsed()} s"
            )

    def on_round(self, round: Round) -> None:
        if not self._rounds:
            _say(f"start:     {_rates(round.before)}")
        self._rounds.append(round)
        verdict = "accepted" if round.accepted else "rejected"
        _say(
            f"round {round.number}/{self._config.rounds}: {_rates(round.after)}  "
            f"{round.release or 'no candidate'} {verdict}, "
            f"{round.trained} updates, {round.seconds:.0f} s"
        )
        if not round.accepted:
            _say(f"  {round.text}")

    def finish(self, data: Path) -> None:
        report: dict[str, Any] = {
            "nodes": self._nodes,
            "seconds": round(time.monotonic() - self._begun, 1),
            "server_peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "config": {**asdict(self._config), "folder": str(self._config.folder)},
            "central": str(data),
            "rounds": [asdict(one) for one in self._rounds],
        }
        (self._config.folder / "report.json").write_text(json.dumps(report, indent=1))
        write_plot(report, self._config.folder / "plot.png")
        _say(f"done in {self._elapsed()} s: {self._config.folder}/report.json, plot.png")
        _say(f"the releases: CENTRAL_DATA_DIR={data} central releases verify --deep")

    def _elapsed(self) -> int:
        return round(time.monotonic() - self._begun)


def _rates(rates: Any) -> str:
    return "  ".join(f"{name} {100 * rate:3.0f} %" for name, rate in sorted(rates.items()))


def _say(text: str) -> None:
    print(f"lorikeet: {text}", flush=True)
