"""How many rounds and bytes a federation needs, beside nodes alone and one learner with all data.

Run: `python -m benchmarks.federation [--json] [--seeds 3] [--quick] [--keep DIRECTORY]`.

In: the quickstart's base (made in --cache when it is missing), seeds. Out: progress on stderr; with
--json one object as the last line: `success[rule][seed][round][environment]` in percent of held-out
tasks, `before[seed][environment]`, bytes of an increment and of a release by rule, `bars`. A and B
learn, C (the same company) never does, `base` is what the base could do. There are no servers and
no gate. A server step of 2, int8, different ranks and a slow node are tried with the first seed.
`slow` counts merges; its node B takes four for a round.

With --keep a run that was stopped goes on: every increment and every figure is kept there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import describe_machine  # first: it limits BLAS to one thread
from benchmarks.federation.bars import ENCODED, bars, fall
from benchmarks.federation.chains import CHAINS, ROUNDS, SLOW, before, run_from
from benchmarks.federation.plot import write_plot
from benchmarks.rules.world import TASKS
from examples.quickstart.model import build_base

QUICK = ("centralised", "default", "local-A", "local-B")
QUICK_ROUNDS, QUICK_TASKS = 3, 40


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.federation", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line of stdout"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--rules", nargs="+", choices=CHAINS, default=list(CHAINS))
    parser.add_argument("--rounds", type=int, default=3 * SLOW, help="the most of a rule")
    parser.add_argument("--quick", action="store_true", help="a look: few rules, rounds and tasks")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--keep", type=Path, help="a folder for what was trained and measured")
    parser.add_argument("--plot", type=Path, help="a PNG of it")
    parser.add_argument("--cache", type=Path, default=Path(".cache/quickstart"))
    options = parser.parse_args(arguments)
    base = build_base(options.cache)
    with tempfile.TemporaryDirectory(prefix="lk-federation-") as folder:
        report = measure(options, base, options.keep or Path(folder))
    if options.plot:
        write_plot(report, options.plot)
    for name, holds in report["bars"].items():
        print(f"{'holds' if holds else 'FAILS'}: {name}", file=sys.stderr)
    if options.json:
        print(json.dumps(report), flush=True)


def measure(options: argparse.Namespace, base: Path, folder: Path) -> dict[str, Any]:
    """Every rule and seed, side by side in processes."""
    machine, begun = describe_machine(), time.monotonic()
    tasks, most = (QUICK_TASKS, QUICK_ROUNDS) if options.quick else (TASKS, options.rounds)
    rules = [name for name in options.rules if not options.quick or name in QUICK]
    seeds = range(options.seed, options.seed + options.seeds)
    rounds = {name: [at for at in CHAINS[name].rounds if at <= most] for name in rules}
    rules = [name for name in rules if rounds[name]]
    spawn = multiprocessing.get_context("spawn")  # torch does not survive a fork
    with ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
        start = {seed: pool.submit(before, base, seed, tasks, folder) for seed in seeds}
        jobs = {
            (name, seed): pool.submit(run_from, base, seed, tasks, folder, name, rounds[name])
            for seed in seeds
            for name in rules
            if seed == options.seed or not CHAINS[name].once
        }
        done = {key: job.result() for key, job in jobs.items()}
        found = {str(seed): job.result() for seed, job in start.items()}
    runs = {
        name: {str(seed): done[name, seed] for seed in seeds if (name, seed) in done}
        for name in rules
    }
    success = {
        name: {seed: run["success"] for seed, run in seeded.items()}
        for name, seeded in runs.items()
    }
    return {
        "success": success,
        "before": found,
        "bytes": {
            name: sizes(list(runs[name].values()))
            for name in ("product-mean", *ENCODED)
            if name in rules
        },
        "points_below_float32": {name: fall(success, name) for name in ENCODED if name in rules},
        "bars": bars(success, found),
        "seeds": list(seeds),
        "rounds": list(ROUNDS),
        "held_out_tasks": tasks,
        "wall_s": round(time.monotonic() - begun, 1),
        "machine": machine,
    }


def sizes(chains: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Bytes of an increment and of the last release, and the mean relative error of increments."""
    return {
        "up": mean(size for chain in chains for size in chain["up"]),
        "down": mean(chain["down"][-1] for chain in chains),
        "relative_error": float(f"{mean(e for chain in chains for e in chain['errors']):.3g}"),
    }


if __name__ == "__main__":
    main()
