"""What a round of training costs a node: tokens per processor second, and memory.

In: a base, or nothing: then random weights of SmolLM2-135M's shapes in bfloat16. Out: figures; with
`--json` one object as the last line. Each case is the node's own `train_round` in a process of its
own, on random tokens: float32 and bfloat16, short and long examples, a step in parts, activations
computed again, attention alone, one allocation arena for each thread as glibc has it or two in all.

Run: `python -m benchmarks.training [--base DIRECTORY] [--json] [--seed 0]`; about five minutes
of one core and 6 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import describe_machine, peak_rss_mb

SHAPES = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
SHORT = {"rows": 14, "least": 22, "most": 45, "steps": 3}
LONG = {"rows": 12, "least": 256, "most": 256, "steps": 1}
CASES: dict[str, dict[str, Any]] = {
    "short float32": SHORT | {"dtype": "float32"},
    "short bfloat16": SHORT | {"dtype": "bfloat16"},
    "short float32, many arenas": SHORT | {"dtype": "float32", "arenas": None},
    "short bfloat16, many arenas": SHORT | {"dtype": "bfloat16", "arenas": None},
    "long bfloat16": LONG | {"dtype": "bfloat16"},
    "long bfloat16, parts of 768": LONG | {"dtype": "bfloat16", "batch_tokens": 768},
    "long bfloat16, checkpointing": LONG | {"dtype": "bfloat16", "gradient_checkpointing": True},
    "long float32": LONG | {"dtype": "float32"},
    "long bfloat16, many arenas": LONG | {"dtype": "bfloat16", "arenas": None},
    "long bfloat16, attention": LONG | {"dtype": "bfloat16", "targets": "attention"},
}
"""Rows of a step, of `least` to `most` tokens. arenas: MALLOC_ARENA_MAX; None is glibc's own."""
ARENAS = 2
RANK = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every case, or with --case one in this process (the process of its own)."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line of stdout"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, help="a base model directory; random weights without")
    parser.add_argument("--case", choices=CASES, help="only one case, in this process")
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(train(options.base, CASES[options.case], options.seed)), flush=True)
        return
    report: dict[str, Any] = {"machine": describe_machine(), "seed": options.seed, "figures": {}}
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or write_base(Path(folder), options.seed)
        for name, case in CASES.items():
            report["figures"][name] = in_its_own_process(name, case, base, options.seed)
    show(report["figures"])
    if options.json:
        print(json.dumps(report))


def in_its_own_process(name: str, case: dict[str, Any], base: Path, seed: int) -> Any:
    environment = {key: text for key, text in os.environ.items() if key != "MALLOC_ARENA_MAX"}
    if arenas := case.get("arenas", ARENAS):
        environment["MALLOC_ARENA_MAX"] = str(arenas)
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "benchmarks.training", "--case", name]
    command += ["--base", str(base), "--seed", str(seed)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def train(base: Path, case: dict[str, Any], seed: int) -> dict[str, float]:
    """One round. Processor seconds are those of its steps, without loading."""
    from edge_node.learning import training
    from edge_node.learning.batches import Lesson
    from edge_node.learning.compute import Compute
    from edge_node.learning.targets import targeted
    from edge_node.learning.workplace import Workplace
    from protos.base import read_layout

    numbers = random.Random(seed)
    rows = [
        [numbers.randrange(3, 1000) for _ in range(numbers.randint(case["least"], case["most"]))]
        for _ in range(case["rows"] * case["steps"])
    ]
    begun: list[tuple[float, float]] = []

    def beat() -> None:
        """The first one comes when the model is loaded, the next from a layer of a step."""
        if len(begun) < 2:
            begun.append((time.process_time(), peak_rss_mb()))

    with tempfile.TemporaryDirectory() as workspace:
        training.train_round(
            _plan(case, seed),
            Workplace(
                base, None, Path(workspace), beat=beat,
                modules=targeted(
                    case.get("targets", "all-linear"), read_layout(base).module_shapes
                ),
                compute=Compute(
                    "cpu", case.get("gradient_checkpointing", False), case.get("batch_tokens")
                ),
            ),
            own=[Lesson(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows], anchors=[],
        )  # fmt: skip
    cpu_s = time.process_time() - begun[1][0]
    tokens = sum(map(len, rows))
    return {
        "tokens": tokens,
        "tokens_per_cpu_s": round(tokens / cpu_s, 1),
        "loaded_mb": round(begun[0][1]),
        "peak_mb": round(peak_rss_mb()),
    }


def _plan(case: dict[str, Any], seed: int) -> Any:
    from edge_node.learning.plans import RoundPlan

    return RoundPlan(
        number=1, round_id="r1", release_id="", label="", payload_digest="", release_rank=0,
        cursor=0, seed=seed, rank=RANK, alpha=2 * RANK, steps=case["steps"],
        batch_own=case["rows"], batch_hard=0, batch_anchor=0, anchor_pool=1, anchor_seed=0,
        learning_rate=1e-3, max_examples=1000, checkpoint_steps=1000, created_at="",
        dtype=case["dtype"],
    )  # fmt: skip


def write_base(target: Path, seed: int) -> Path:
    """A Llama of SHAPES with random weights in bfloat16, and a tokenizer that is never used."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES, pad_token_id=0, eos_token_id=1))
    model.to(torch.bfloat16).save_pretrained(target)
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(target / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    settings |= {"eos_token": "</s>", "unk_token": "<unk>"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


def show(figures: dict[str, dict[str, float]]) -> None:
    table = Table(title="A round of training")
    for column in ("case", "tokens", "tokens per CPU-second", "loaded, MB", "peak, MB"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, values in figures.items():
        table.add_row(name, *(str(value) for value in values.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
