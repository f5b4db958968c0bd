"""A real model learns sums on a node by reinforcement learning, and its English stays.

In: SmolLM2-135M-Instruct (fetched and converted in --cache when it is missing) and reasoning-gym's
data set `chain_sum` with terms of one digit (`pip install 'lorikeet-federated[reasoning-gym]'`).
Out: figures; with `--json` one object as the last line. The round is a node's own
(edge_node.learning): rollouts come from the node's vLLM in bfloat16, and nobody corrects anything.

Run: `python -m benchmarks.chain_sum [--json] [--seed 0] [--cache .cache/smollm2]`; ten minutes of
two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks import describe_machine
from benchmarks.rl import Releases, serving
from edge_node.environments import EnvironmentProcess
from edge_node.learning.records import NoGain
from edge_node.releases.evaluation import Evaluator, Sampling
from edge_node.settings import EdgeSettings
from examples.ports import free_port
from examples.smollm2.model import build_base
from examples.smollm2.world import SMOLLM2
from protos.base import read_base_model
from protos.lora import LoraTensors

ENVIRONMENT = "sums"
ENGLISH = "english"
TASKS = 100
"""Held-out sums before and after the round."""
DOCUMENTS = 40
MAX_TOKENS = 24
GAIN_BAR = 0.30
ENGLISH_BAR = 0.1
"""Most nats a token that English text may become less likely."""


def settings_for(data_dir: Path, base: Path, anchors: Path, seed: int, **grpo: Any) -> EdgeSettings:
    return EdgeSettings.model_validate(
        {
            "data_dir": data_dir,
            "base": {"path": base},
            "serving": {
                "port": free_port(), "max_model_len": 256, "dtype": "bfloat16", "max_lora_rank": 32,
            },
            "environments": [
                {
                    "name": ENVIRONMENT,
                    "factory": "edge_node.environments.adapters.reasoning_gym:ReasoningGym",
                    "options": {
                        "dataset": "chain_sum",
                        "config": {
                            "min_digits": 1, "max_digits": 1, "min_terms": 2, "max_terms": 4,
                        },
                        "extract": "last-number",
                    },
                    "rollouts": True,
                },
                {
                    "name": ENGLISH,
                    "factory": "examples.smollm2.desk:EnglishText",
                    "anchor": True,
                },
            ],
            "releases": {"max_answer_tokens": MAX_TOKENS},
            "learning": {
                "seed": seed, "dtype": "bfloat16", "rank": 8, "alpha": 16, "batch_anchor": 6,
                "anchors": anchors, "grpo": {"max_answer_tokens": MAX_TOKENS} | grpo,
            },
        }
    )  # fmt: skip


async def run(cache: Path, seed: int, folder: Path, **grpo: Any) -> dict[str, Any]:
    """The figures of one round; `grpo` overrides settings."""
    from edge_node.learning.exploration import train_on_verifiers
    from edge_node.learning.workplace import find_workplace

    path = await asyncio.to_thread(build_base, cache)
    anchors = await asyncio.to_thread(SMOLLM2.beside_base, path)
    base = read_base_model(path)
    settings = settings_for(folder, path, Path(anchors["EDGE_LEARNING__ANCHORS"]), seed, **grpo)
    figures: dict[str, Any] = {}
    async with AsyncExitStack() as held:
        environments = {
            spec.name: (spec, held.enter_context(EnvironmentProcess(spec)).environment)
            for spec in settings.environments
        }
        control = await held.enter_async_context(serving(settings, base))
        evaluator = Evaluator(control.requests, environments, seed, MAX_TOKENS)

        async def success(name: str) -> float:
            result = await evaluator.compare(ENVIRONMENT, name, name, 0, TASKS, Sampling())
            return result.both_passed / TASKS

        releases = Releases(settings, base, control)
        start = await releases.add(LoraTensors())
        reached = [await success(start)]
        print(f"before: {reached[0]:.0%}", file=sys.stderr)
        began, workspace = time.monotonic(), folder / "round"
        workspace.mkdir()
        try:
            plan = releases.plan(1)
            place = find_workplace(plan, settings, releases.folder, workspace)
            trained = await asyncio.to_thread(train_on_verifiers, plan, settings, place)
        except NoGain as error:
            figures["no_gain"] = str(error)
        else:
            figures = trained.metrics | {"wall_s": round(time.monotonic() - began, 1)}
            after = await releases.add(trained.tensors)
            reached.append(await success(after))
            texts = await evaluator.compare(ENGLISH, after, start, 0, DOCUMENTS, Sampling())
            figures["english_before"] = texts.likelihood.reference_mean
            figures["english_after"] = texts.likelihood.candidate_mean
            print(f"after: {reached[-1]:.0%}", file=sys.stderr)
    fall = figures.get("english_before", 0.0) - figures.get("english_after", 0.0)
    return {
        "environment": "reasoning-gym chain_sum, 2 to 4 terms of one digit",
        "held_out_tasks": TASKS,
        "success": reached,
        "round": figures,
        "settings": settings.learning.grpo.model_dump(),
        "bars": {
            "sums_up_by_30_points": reached[-1] - reached[0] >= GAIN_BAR,
            "english_within_0.1_nats": len(reached) > 1 and fall <= ENGLISH_BAR,
        },
        "seed": seed,
        "machine": describe_machine(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path(".cache/smollm2"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="lk-sums-") as folder:
        result = asyncio.run(run(options.cache, options.seed, Path(folder)))
    if options.json:
        print(json.dumps(result))
    else:
        print(json.dumps(result, indent=2), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
