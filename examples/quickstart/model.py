"""The quickstart's base model: built once, then found.

In: a cache directory. Out: a Hugging Face model directory that transformers, PEFT and vLLM load. Guarantees: the
directory appears under its final name only when it is complete (a killed build leaves a `.building-*` directory that
the next build removes); a second call returns at once and imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from examples.quickstart.corpus import BaseRecipe

Progress = Callable[[int, int], None]
"""progress(step, steps)"""


def build_base(cache: Path, progress: Progress | None = None, recipe: BaseRecipe | None = None) -> Path:
    """Directory of the base model below `cache`; trains it first when it is not there (1.5 minutes on two cores)."""
    recipe = recipe or BaseRecipe()
    digest = recipe.digest()[:16]
    target = cache / f"base-{digest}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    for stale in cache.glob(f".building-{digest}-*"):
        owner = int(stale.name.rpartition("-")[2])
        if owner == os.getpid() or not _is_alive(owner):
            shutil.rmtree(stale)
    building = cache / f".building-{digest}-{os.getpid()}"
    building.mkdir(mode=0o755)
    from examples.quickstart.train import train_base

    train_base(recipe, building, progress or (lambda step, steps: None))
    for path in building.iterdir():
        path.chmod(0o644)  # safetensors writes 0600: central or a node under another user could not read it
        _sync(path)
    _sync(building)
    try:
        building.rename(target)
    except OSError:  # another build of the same recipe was faster; its result is the same
        if not target.is_dir():
            raise
        shutil.rmtree(building)
    _sync(cache)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="directory that keeps built models")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model's weights and data order")
    arguments = parser.parse_args()
    started = time.monotonic()

    def show(step: int, steps: int) -> None:
        if step % 10 and step != steps:
            return
        filled = 30 * step // steps
        elapsed = time.monotonic() - started
        bar = "#" * filled + "." * (30 - filled)
        end = "\n" if step == steps else ""
        print(f"\rbase model [{bar}] {step}/{steps} steps, {elapsed:.0f} s", end=end, file=sys.stderr, flush=True)

    print(build_base(arguments.cache, show, BaseRecipe(seed=arguments.seed)))
    return 0


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
