"""What is forgotten while eight environments are learnt one after the other on two nodes.

Run: `python -m benchmarks.forgetting [--json] [--seeds 0 1 2] [--rules ...] [--plot FILE]`.

In: seeds, and the quickstart's base model (made in --cache when it is missing, which takes
minutes). Out: progress and a table on stderr, a plot, and with `--json` one object as the last line
of stdout. `success[rule][seed][step][environment]` is in percent of held-out tasks, greedy; step 0
is the base. `continual[rule][seed]` has the figures of the last step, as fractions.

At step k both nodes meet desk k (federation.py), each other tasks of it. Each trains a round, and
central's product mean merges both. Then the release answers tasks of all desks and of the public
tenants, which the anchors are drawn from. A round's newest examples (`max_examples`) are those of
one step, as at a node whose history is longer than that.

`--quick` is a look: three desks, one seed. With `--keep FOLDER` a benchmark that was ended goes on
after the steps that are in the folder; `machine` is then what it was at the end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import describe_machine  # first: it limits BLAS to one thread
from benchmarks.forgetting.federation import ANCHOR
from benchmarks.forgetting.plot import write_plot
from benchmarks.forgetting.runs import ATTEMPTS, DESKS, RULES, Run, run
from central.gate.continual import Row, continual, pass_hat_k
from examples.quickstart.model import build_base

OURS = "replay and anchors"
BAR_POINTS = 5.0


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    report = measure(options)
    show(report)
    if options.plot:
        write_plot(report, options.plot)
    if options.json:
        print(json.dumps(report), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--quick", action="store_true", help="three desks, the first seed")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side")
    parser.add_argument("--cache", type=Path, default=Path(".cache/quickstart"))
    parser.add_argument("--plot", type=Path, help="where to write the plot (PNG)")
    parser.add_argument("--keep", type=Path, help="folder of what is done already")
    return parser


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every rule with every seed, in processes of their own."""
    machine, began = describe_machine(), time.monotonic()
    base = build_base(options.cache)
    seeds, count = (options.seeds[:1], 3) if options.quick else (options.seeds, DESKS)
    # Seed by seed, so that rules that are compared run under the same load.
    runs = [Run(base, rule, seed, count, options.keep) for seed in seeds for rule in options.rules]
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(run, runs))
    success: dict[str, Any] = {rule: {} for rule in options.rules}
    attempts: dict[str, Any] = {rule: {} for rule in options.rules}
    for job, result in zip(runs, results, strict=True):
        success[job.rule][str(job.seed)] = result["success"]
        attempts[job.rule][str(job.seed)] = result["attempts_right"]
    cpu_s = sum(result["cpu_s"] for result in results)
    return report_of(success, attempts) | {
        "cpu_s": round(cpu_s, 1),
        "wall_s": round(time.monotonic() - began, 1),
        "machine": machine,
    }


def report_of(
    success: Mapping[str, Mapping[str, Sequence[Row]]],
    attempts: Mapping[str, Mapping[str, Mapping[str, Sequence[int]]]],
) -> dict[str, Any]:
    figures = {
        rule: {seed: asdict(continual(_fractions(rows), learnt(rows))) for seed, rows in of.items()}
        for rule, of in success.items()
    }
    deepest = {
        rule: {seed: round(deepest_fall(rows), 1) for seed, rows in of.items()}
        for rule, of in success.items()
    }
    bars = {}
    if OURS in deepest:
        bars["never_more_than_5_points_below_an_earlier_best"] = all(
            fall <= BAR_POINTS for fall in deepest[OURS].values()
        )
    return {
        "success": success,
        "attempts_right": attempts,
        "continual": figures,
        "pass_hat_k": {
            rule: {seed: _pass_hat(right) for seed, right in of.items()}
            for rule, of in attempts.items()
        },
        "deepest_fall_points": deepest,
        "bars": bars,
        "seeds": sorted({int(seed) for of in success.values() for seed in of}),
    }


def learnt(rows: Sequence[Row]) -> dict[str, int]:
    """At which step each environment was learnt: desk k at step k, the anchors before."""
    return {name: 0 if name == ANCHOR else int(name.rpartition("-")[2]) for name in rows[0]}


def deepest_fall(rows: Sequence[Row]) -> float:
    """Points of the environment and step furthest below an earlier best, once it was learnt."""
    worst = [
        found.worst
        for last in range(1, len(rows))
        if (found := continual(_fractions(rows[: last + 1]), learnt(rows))).worst
    ]
    return max((100 * (fall.best - fall.now) for fall in worst if fall), default=0.0)


def _fractions(rows: Sequence[Row]) -> list[Row]:
    return [
        {name: None if value is None else value / 100 for name, value in row.items()}
        for row in rows
    ]


def _pass_hat(right: Mapping[str, Sequence[int]]) -> dict[str, float | None]:
    """pass^k over all environments."""
    samples = [(ATTEMPTS, count) for counts in right.values() for count in counts]
    return {str(k): pass_hat_k(samples, k) for k in (1, 2, 4, 8)}


def show(report: Mapping[str, Any]) -> None:
    table = Table(title="After the last step, percent and points")
    columns = ("rule", "seed", "ACC", "BWT", "FWT", "forgetting", "deepest fall", "anchors")
    for column in (*columns, "pass^1", "pass^8"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for rule, of in report["success"].items():
        for seed, rows in of.items():
            found = report["continual"][rule][seed]
            names = ("average", "backward_transfer", "forward_transfer", "forgetting")
            chances = report["pass_hat_k"][rule][seed]
            table.add_row(
                rule,
                seed,
                *(_points(found[name]) for name in names),
                f"{report['deepest_fall_points'][rule][seed]:.0f}",
                f"{rows[-1][ANCHOR]:.0f}",
                *(_points(chances[k]) for k in ("1", "8")),
            )
    Console(stderr=True, width=110).print(table)
    print(f"bars: {report['bars']}", file=sys.stderr)


def _points(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f}"


if __name__ == "__main__":
    main()
