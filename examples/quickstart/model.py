"""The quickstart's base model: built once, then found.

In: a cache directory. Out: a Hugging Face model directory that transformers, PEFT and vLLM load.
Guarantees: the directory appears under its final name only when it is complete (a killed build
leaves a `.building-*` directory that the next build removes); a second call returns at once and
imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from examples.quickstart.built import built_once
from examples.quickstart.corpus import BaseRecipe

Progress = Callable[[int, int], None]
"""progress(step, steps)"""


def build_base(
    cache: Path, progress: Progress | None = None, recipe: BaseRecipe | None = None
) -> Path:
    """Directory of the base model below `cache`; trains it first when it is missing.

    Training takes 1.5 minutes on two cores.
    """
    recipe = recipe or BaseRecipe()

    def build(directory: Path) -> None:
        from examples.quickstart.train import train_base

        train_base(recipe, directory, progress or (lambda step, steps: None))

    return built_once(cache, f"base-{recipe.digest()[:16]}", build)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--cache", type=Path, required=True, help="directory that keeps built models"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the model's weights and data order"
    )
    arguments = parser.parse_args()
    started = time.monotonic()

    def show(step: int, steps: int) -> None:
        if step % 10 and step != steps:
            return
        filled = 30 * step // steps
        elapsed = time.monotonic() - started
        bar = "#" * filled + "." * (30 - filled)
        end = "\n" if step == steps else ""
        print(
            f"\rbase model [{bar}] {step}/{steps} steps, {elapsed:.0f} s",
            end=end,
            file=sys.stderr,
            flush=True,
        )

    print(build_base(arguments.cache, show, BaseRecipe(seed=arguments.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
