"""A directory that is made once and then found.

In: a cache directory, a name that says what is in it, and how to make it. Out: the directory.
Guarantees: it has its final name only when it is complete and on the disk. A killed build leaves a
`.building-*` directory, which the next build removes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from lorikeet.durable import sync


def built_once(cache: Path, name: str, build: Callable[[Path], None]) -> Path:
    """`cache/name`; when it is missing, `build` fills an empty directory that then gets this name.

    Raises what `build` raises; then nothing is kept.
    """
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    for stale in cache.glob(f".building-{name}-*"):
        owner = int(stale.name.rpartition("-")[2])
        if owner == os.getpid() or not _is_alive(owner):
            shutil.rmtree(stale)
    building = cache / f".building-{name}-{os.getpid()}"
    building.mkdir(mode=0o755)
    try:
        build(building)
    except BaseException:
        shutil.rmtree(building)
        raise
    for path in building.iterdir():
        # safetensors writes 0600: central or a node under another user could not read it.
        path.chmod(0o644)
        sync(path)
    sync(building)
    try:
        building.rename(target)
    except OSError:  # another build of the same recipe was faster; its result is the same
        if not target.is_dir():
            raise
        shutil.rmtree(building)
    sync(cache)
    return target


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
