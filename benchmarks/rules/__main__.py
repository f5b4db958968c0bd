"""Which merge rule needs the fewest rounds on the quickstart's problem.

Run: `python -m benchmarks.rules --seed 0 --rounds 4`.

In: a seed, rules, a number of rounds. Out: progress on stderr and, with --json, one JSON object as
the last line of stdout: success in percent per rule and round on 100 held-out tasks each of A, B, C
(same company, never trained) and the public anchor.

Real are the base model, the tasks, a node's round (edge_node.learning with the quickstart's recipe)
and the merge (central.merging). Simulated is the rest: nodes A and B train one after the other on
tasks with known answers, 400 before the first round and 100 more before each further one, every
round is merged, and there is no gate. With `--slow k` B needs k merges for a round: it starts from
the release of that time, and A's updates are merged without it meanwhile. For the product mean it
also says how far each release is from the sum of all increments, as a multiple of the distance of
that sum's best approximation of the same rank. About a minute of one core per rule and round.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks import describe_machine  # first: it limits BLAS to one thread
from benchmarks.rules.world import World
from central.merging import Merged, merge
from examples.quickstart.model import build_base
from protos.lora import LoraModule, LoraTensors

RANK = 32


Rule = Callable[[LoraTensors, Sequence[LoraTensors]], Merged]
"""(parent, new increments) -> the next release."""


def product_mean(
    parent: LoraTensors, increments: Sequence[LoraTensors], server_step: float = 1.0
) -> Merged:
    """central's default."""
    return merge(
        parent,
        [(item, 1 / len(increments)) for item in increments],
        rank=RANK,
        server_step=server_step,
        seed=0,
    )


def factor_mean(parent: LoraTensors, increments: Sequence[LoraTensors]) -> Merged:
    """The mean of A and the mean of B, as FedAvg averages a LoRA, added in product space."""
    share = 1 / len(increments)
    mean = {}
    for name in increments[0].modules:
        parts = [item.modules[name] for item in increments]
        A = sum(share * part.A for part in parts)
        B = sum(share * part.scale * part.B for part in parts)
        mean[name] = LoraModule(np.asarray(A, np.float32), np.asarray(B, np.float32))
    return merge(parent, [(LoraTensors(mean), 1.0)], rank=RANK, server_step=1.0, seed=0)


RULES: Mapping[str, Rule] = {"product-mean": product_mean, "factor-mean": factor_mean}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rules", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line of stdout"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--slow", type=int, default=1, metavar="K", help="merges that a round of node B takes"
    )
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(".cache/quickstart"),
        help="where the tiny base model is kept",
    )
    options = parser.parse_args(arguments)
    world = World(build_base(options.cache), options.seed)
    first: dict[str, LoraTensors] = {}
    success: dict[str, list[dict[str, int]]] = {}
    over_optimum: list[float] = []
    start = time.process_time()
    for rule in options.rules:
        releases, success[rule], whole = [LoraTensors()], [], Whole()
        for number in range(1, options.rounds + 1):
            new: list[LoraTensors] = []
            for node, takes in (("A", 1), ("B", options.slow)):
                if number % takes:
                    continue
                begun = releases[number - takes]
                known = first.get(node) if number == takes else None
                increment = known or world.train(node, number // takes, begun)
                first.setdefault(
                    node, increment
                )  # a first round starts from the base under every rule
                new.append(increment)
            releases.append(RULES[rule](releases[-1], new).tensors)
            success[rule].append(world.success(releases[-1]))
            print(
                f"seed {options.seed} {rule} round {number}: {success[rule][-1]}",
                file=sys.stderr,
                flush=True,
            )
            if rule == "product-mean":
                whole.add(new)
                over_optimum.append(whole.over_optimum(releases[-1]))
                print(
                    f"    {over_optimum[-1]} of the optimum's distance", file=sys.stderr, flush=True
                )
    result = {
        "success_percent": success,
        "product_mean_over_optimum": over_optimum,
        "slow": options.slow,
        "cpu_s": round(time.process_time() - start, 1),
        "seed": options.seed,
    }
    if options.json:
        print(json.dumps({**result, "bars": {}, "machine": describe_machine()}), flush=True)


class Whole:
    """The sum of all that the product mean merged, without truncation.

    It is dense: the tiny base permits that.
    """

    def __init__(self) -> None:
        self._modules: dict[str, npt.NDArray[np.float64]] = {}

    def add(self, increments: Sequence[LoraTensors]) -> None:
        for increment in increments:
            for name, module in increment.modules.items():
                self._modules[name] = self._modules.get(name, 0.0) + dense(module) / len(increments)

    def over_optimum(self, release: LoraTensors) -> float:
        """The release's distance as a multiple of that of the best approximation of rank RANK.

        Over all modules; 1 where both are exact.
        """
        total = distance = optimum = 0.0
        for name, whole in self._modules.items():
            squares = np.linalg.svd(whole, compute_uv=False) ** 2
            total, optimum = total + squares.sum(), optimum + squares[RANK:].sum()
            distance += np.sum((whole - dense(release.modules[name])) ** 2)
        exact = optimum < 1e-10 * total
        return 1.0 if exact else round(math.sqrt(distance / optimum), 4)


def dense(module: LoraModule) -> npt.NDArray[np.float64]:
    """The module's increment, [out_features, in_features]."""
    return module.scale * (module.B.astype(np.float64) @ module.A.astype(np.float64))


if __name__ == "__main__":
    main()
