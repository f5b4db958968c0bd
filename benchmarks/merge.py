"""How fast and how exact merging is at the shapes of Llama-3.1-8B, beside PEFT, torch and Flower.

In: a seed. Out: a table on stderr and, with --json, one JSON object as the last line of stdout:
CPU-seconds on one core of this process (`time.process_time`, so other load on the machine counts
less), errors over the optimum and peak memory.

Updates are made as sites make them: rank 16, of which 8 directions are shared by all, 4 belong to
one of 16 environments that arrive in order (the hard case for a fold), 4 are the update's own
noise, and every direction is perturbed per update. The optimum is a dense float64 oracle: ||M||_F^2
less the 16 largest eigenvalues of M M^T.

PEFT's svd is timed once per shape and number of adapters, on one module; the others are medians.
One full layer is summed in a process of its own, updates generated one at a time and not timed, for
its peak memory (VmHWM). It is merged with as many workers as there are cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from benchmarks import describe_machine, peak_rss_mb
from benchmarks.side_by_side import REPEATS, SideBySide, side_by_side
from central.merging import Merged, ProductSum, merge
from protos.lora import LoraModule, LoraTensors

Matrix = npt.NDArray[np.float64]

RANK = 16
COUNTS = (4, 16)
STREAMED = (16, 64, 256)
LAYERS = 32
SIDE_BY_SIDE = {"exact": (16, 512), "small fold": (24, 128)}
"""Number of updates, and the rank that a module holds at most."""
SHAPES = {  # (out_features, in_features) of the seven projections of one layer
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
MEASURED = ("k", "q")
SHARED, PER_ENVIRONMENT, ENVIRONMENTS = 8, 4, 16
FORMULA = f"ours_cpu_s: {LAYERS} * CPU-seconds of one full layer; ours_peak_rss_mb: that layer's"


class Sites:
    """Updates of one module from a fleet of sites. Each can be made alone."""

    def __init__(self, name: str, seed: int) -> None:
        self._shape = SHAPES[name]
        self._seed = [seed, list(SHAPES).index(name)]
        rng = np.random.default_rng(self._seed)
        directions = SHARED + PER_ENVIRONMENT * ENVIRONMENTS
        self._left = rng.standard_normal((self._shape[0], directions), np.float32)
        self._right = rng.standard_normal((directions, self._shape[1]), np.float32)

    def update(self, index: int, count: int) -> LoraModule:
        """The factors of update `index` of `count`, scale 2 (alpha = 2 r)."""
        rng = np.random.default_rng([*self._seed, 1, index])
        first = SHARED + PER_ENVIRONMENT * (index * ENVIRONMENTS // count)
        used = [*range(SHARED), *range(first, first + PER_ENVIRONMENT)]
        B = rng.standard_normal((self._shape[0], RANK), np.float32)
        A = rng.standard_normal((RANK, self._shape[1]), np.float32)
        # Half as much perturbation as direction; an environment's directions are learnt twice as
        # strongly.
        B[:, : len(used)] = self._left[:, used] + np.float32(0.5) * B[:, : len(used)]
        B[:, SHARED : len(used)] *= 2
        A[: len(used)] = self._right[used] + np.float32(0.5) * A[: len(used)]
        return LoraModule(A / np.float32(64), B / np.float32(64), 2.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything, or with --layer N only one layer's sum (the process of its own)."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merge", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line of stdout"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="only sum N updates of one full layer, and print its figures",
    )
    options = parser.parse_args(arguments)
    if options.layer is not None:
        print(json.dumps(sum_layer(options.layer, options.seed)))
        return
    machine = {
        **describe_machine(),
        "blas_threads": 1,
        **{name: version(name) for name in ("numpy", "torch", "peft", "flwr")},
    }
    console = Console(stderr=True, soft_wrap=True, width=None if sys.stderr.isatty() else 120)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("merge", total=sum(WORK.values()))

        def advance(step: str, description: str) -> None:
            progress.update(task, advance=WORK[step], description=description)

        figures = measure(options.seed, advance)
    console.print(table_of(figures))
    console.print(f"Extrapolation: {FORMULA}")
    bars = judge(figures)
    console.print(
        f"Ours, exact, over PEFT's svd on q at N=16: {speed_up(figures):.0f} times faster"
    )
    for name, pair in figures.side_by_side.items():
        console.print(
            f"Two workers, {name}: {pair.speed_up:.2f} times as fast (median of {REPEATS} pairs; "
            f"largest {pair.largest_speed_up:.2f}) on {pair.cores_used:.2f} cores that were free; "
            f"CPU-seconds {pair.cpu_s_ratio:.2f} times those of one worker"
        )
    console.print(
        "\n".join(f"{name}: {'holds' if held else 'FAILS'}" for name, held in bars.items())
    )
    result = {**asdict(figures), "bars": bars, "seed": options.seed, "machine": machine}
    if options.json:
        print(json.dumps(result), flush=True)


ByShape = dict[str, dict[str, float]]
"""shape -> number of updates -> figure."""


@dataclass
class Figures:
    """Every figure under its name in the issue; a whole model's by the number of updates."""

    peft_svd_cpu_s: ByShape = field(default_factory=lambda: {shape: {} for shape in MEASURED})
    svd_lowrank_cpu_s: ByShape = field(default_factory=lambda: {shape: {} for shape in MEASURED})
    flwr_fedavg_cpu_s: ByShape = field(default_factory=lambda: {shape: {} for shape in MEASURED})
    ours_exact_cpu_s: ByShape = field(default_factory=lambda: {shape: {} for shape in MEASURED})
    ours_error_over_optimum: ByShape = field(
        default_factory=lambda: {shape: {} for shape in MEASURED}
    )
    ours_cpu_s: dict[str, float] = field(default_factory=dict)
    ours_peak_rss_mb: dict[str, float] = field(default_factory=dict)
    side_by_side: dict[str, SideBySide] = field(default_factory=dict)
    """Two workers against one, in one exact step and where sums are folded."""


WORK = {"exact": 40, "small fold": 60, "k": 11, "q": 88, "fold": 5, "16": 2, "64": 6, "256": 40}
"""Seconds that a step takes, about, for the progress bar."""


def measure(seed: int, advance: Callable[[str, str], None]) -> Figures:
    """Every figure; `advance(step, description)` is called after each step of WORK."""
    figures = Figures()
    for name, (count, exact_rank) in SIDE_BY_SIDE.items():
        layer = full_layer(count, seed)
        figures.side_by_side[name] = side_by_side(layer, RANK, exact_rank, seed)
        advance(name, f"two workers, {name}")
    for shape in MEASURED:
        sites = Sites(shape, seed)
        for count in COUNTS:
            updates = [sites.update(index, count) for index in range(count)]
            key = str(count)
            figures.ours_exact_cpu_s[shape][key] = median_cpu_s(partial(ours, updates, seed), 7)
            figures.svd_lowrank_cpu_s[shape][key] = svd_lowrank(updates)
            figures.flwr_fedavg_cpu_s[shape][key] = flwr_fedavg(updates)
            figures.ours_error_over_optimum[shape][key] = error_over_optimum(
                updates, ours(updates, seed)
            )
            figures.peft_svd_cpu_s[shape][key] = peft_svd(updates)
        advance(shape, f"{shape} projection")
    sites = Sites("k", seed)
    many = [sites.update(index, STREAMED[-1]) for index in range(STREAMED[-1])]
    figures.ours_error_over_optimum["k"][str(STREAMED[-1])] = error_over_optimum(
        many, ours(many, seed)
    )
    del many
    advance("fold", "fold on k")
    for count in STREAMED:
        command = [
            sys.executable,
            "-m",
            "benchmarks.merge",
            "--layer",
            str(count),
            "--seed",
            str(seed),
        ]
        done = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        )
        figures.ours_cpu_s[str(count)] = LAYERS * done["cpu_s"]
        figures.ours_peak_rss_mb[str(count)] = done["peak_rss_mb"]
        advance(str(count), f"one layer, N={count}")
    return figures


def judge(figures: Figures) -> dict[str, bool]:
    """The bars of the issue."""
    errors, memory = figures.ours_error_over_optimum, figures.ours_peak_rss_mb
    return {
        "exact_300x_faster_than_peft_svd_on_q_at_16": speed_up(figures) >= 300,
        "exact_within_1_plus_1e-6_of_optimum": all(
            errors[shape][str(count)] <= 1 + 1e-6 for shape in MEASURED for count in COUNTS
        ),
        "streaming_within_1.02_of_optimum_on_k_at_256": errors["k"]["256"] <= 1.02,
        "peak_memory_at_256_within_1.1_of_64": memory["256"] <= 1.1 * memory["64"],
        "two_workers_at_least_1.8_times_as_fast": all(
            pair.speed_up >= 1.8 for pair in figures.side_by_side.values()
        ),
        "two_workers_same_bytes": all(pair.same_bytes for pair in figures.side_by_side.values()),
    }


def speed_up(figures: Figures) -> float:
    """PEFT's CPU-seconds over ours, q shape, 16 updates."""
    return figures.peft_svd_cpu_s["q"]["16"] / figures.ours_exact_cpu_s["q"]["16"]


def median_cpu_s(call: Callable[[], object], times: int) -> float:
    """Median CPU-seconds of `call`, after one call that warms caches."""
    call()
    seconds = []
    for _ in range(times):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def ours(updates: Sequence[LoraModule], seed: int) -> Merged:
    """The mean of the products at rank 16, by the path that central merges with."""
    weighted = ((LoraTensors({"m": module}), 1 / len(updates)) for module in updates)
    return merge(LoraTensors(), weighted, rank=RANK, server_step=1.0, seed=seed)


def error_over_optimum(updates: Sequence[LoraModule], merged: Merged) -> float:
    """||M - M_hat||_F over the least of any rank-16 matrix, by dense float64."""
    dense: Matrix = np.zeros((updates[0].B.shape[0], updates[0].A.shape[1]))
    for module in updates:
        dense += (module.scale / len(updates)) * (
            module.B.astype(np.float64) @ module.A.astype(np.float64)
        )
    spectrum = np.linalg.eigvalsh(dense @ dense.T)
    optimum = np.sqrt(np.sum(spectrum[:-RANK]))
    module = merged.tensors.modules["m"]
    dense -= module.B.astype(np.float64) @ module.A.astype(np.float64)
    return float(np.linalg.norm(dense) / optimum)


def svd_lowrank(updates: Sequence[LoraModule]) -> float:
    """The dense mean and torch.svd_lowrank with our oversampling, q = R + 16, niter 2.

    The mean is one product of stacked factors.
    """
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    A = torch.from_numpy(np.concatenate([module.A for module in updates]))
    B = torch.from_numpy(
        np.concatenate(
            [module.B * np.float32(module.scale / len(updates)) for module in updates], axis=1
        )
    )
    return median_cpu_s(lambda: torch.svd_lowrank(B @ A, q=RANK + 16, niter=2), 3)


def flwr_fedavg(updates: Sequence[LoraModule]) -> float:
    """Flower's FedAvg over the factors: it averages A and B apart.

    So it is a figure of cost and not of a right result.
    """
    from flwr.app import (
        Array,
        ArrayRecord,
        ConfigRecord,
        Message,
        MessageType,
        MetricRecord,
        RecordDict,
    )
    from flwr.serverapp.strategy import FedAvg

    logging.getLogger("flwr").setLevel(
        logging.WARNING
    )  # it logs every call, and that would be timed
    strategy = FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    replies = []
    for node, module in enumerate(updates, start=1):
        request = Message(content=RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN)
        arrays = ArrayRecord({"m/A": Array(module.A), "m/B": Array(module.B)})
        content = RecordDict(
            {
                "arrays": arrays,
                "metrics": MetricRecord({"num-examples": 1}),
                "config": ConfigRecord(),
            }
        )
        replies.append(Message(content, reply_to=request))
    return median_cpu_s(lambda: strategy.aggregate_train(1, replies), 5)


def peft_svd(updates: Sequence[LoraModule]) -> float:
    """PEFT's add_weighted_adapter(combination_type="svd") on one linear layer, once."""
    import torch
    from peft import LoraConfig, PeftModel

    torch.set_num_threads(1)
    out_features, in_features = updates[0].B.shape[0], updates[0].A.shape[1]
    base = torch.nn.ModuleDict({"m": torch.nn.Linear(in_features, out_features, bias=False)})
    config = LoraConfig(r=RANK, lora_alpha=int(updates[0].scale * RANK), target_modules=["m"])
    model = PeftModel(base, config, adapter_name="u0")
    names = [f"u{index}" for index in range(len(updates))]
    for name in names[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model["m"]
    for name, module in zip(names, updates, strict=True):
        layer.lora_A[name].weight.data = torch.from_numpy(module.A)
        layer.lora_B[name].weight.data = torch.from_numpy(module.B)
    start = time.process_time()
    model.base_model.add_weighted_adapter(
        names, [1 / len(names)] * len(names), "merged", combination_type="svd", svd_rank=RANK
    )
    return time.process_time() - start


def full_layer(count: int, seed: int) -> list[LoraTensors]:
    """The updates of `count` sites for the seven projections."""
    sites = {name: Sites(name, seed) for name in SHAPES}
    return [
        LoraTensors({name: of.update(index, count) for name, of in sites.items()})
        for index in range(count)
    ]


def sum_layer(count: int, seed: int) -> dict[str, float]:
    """CPU-seconds of merging `count` updates of one full layer, and the process's peak memory."""
    sites = {name: Sites(name, seed) for name in SHAPES}
    total = ProductSum(rank=RANK, seed=seed)
    cpu_s = 0.0
    for index in range(count):
        update = LoraTensors({name: of.update(index, count) for name, of in sites.items()})
        start = time.process_time()
        total.add(update, 1 / count)
        cpu_s += time.process_time() - start
    start = time.process_time()
    total.result()
    return {"cpu_s": cpu_s + time.process_time() - start, "peak_rss_mb": peak_rss_mb()}


def table_of(figures: Figures) -> Table:
    """The figures, one row each."""
    counts = sorted({*COUNTS, *STREAMED})
    table = Table(
        *(
            Column(head, no_wrap=True)
            for head in ("figure", "shape", *(f"N={count}" for count in counts))
        )
    )

    def add(name: str, shape: str, values: dict[str, float], digits: str = ".4g") -> None:
        table.add_row(
            name, shape, *(f"{values[str(n)]:{digits}}" if str(n) in values else "" for n in counts)
        )

    for shape in MEASURED:
        add("peft_svd_cpu_s", shape, figures.peft_svd_cpu_s[shape])
        add("svd_lowrank_cpu_s", shape, figures.svd_lowrank_cpu_s[shape])
        add("flwr_fedavg_cpu_s", shape, figures.flwr_fedavg_cpu_s[shape])
        add("ours_exact_cpu_s", shape, figures.ours_exact_cpu_s[shape])
        add("ours_error_over_optimum", shape, figures.ours_error_over_optimum[shape], ".9f")
    add("ours_cpu_s", f"layer x {LAYERS}", figures.ours_cpu_s)
    add("ours_peak_rss_mb", "layer", figures.ours_peak_rss_mb)
    return table


if __name__ == "__main__":
    main()
