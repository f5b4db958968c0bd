"""Is there room in memory for a second copy of the base? By the machine's own word and the
container's.

In: the number of parameters. Out: bytes. Linux only; where nothing can be read, there is no room.
"""

from __future__ import annotations

import re
from pathlib import Path

FLOAT32_UP_TO = 1_000_000_000
"""Parameters up to which the reference is computed in float32; beyond, in bfloat16."""
PROCESS_BYTES = 700 << 20
"""Torch, transformers and PEFT: 456 MiB were measured, and an adapter comes on top."""
SPARE = 1.25
"""Times the weights: activations, and what is read from the checkpoint at once."""
MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


def needed_bytes(parameters: int) -> int:
    """Of the process that makes a reference."""
    width = 4 if parameters <= FLOAT32_UP_TO else 2
    return PROCESS_BYTES + int(SPARE * width * parameters)


def free_bytes(memory: Path = MEMORY, group: Path = GROUP) -> int:
    """What this process may still use."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", memory.read_text(), re.MULTILINE)
        free = int(found[1]) << 10 if found else 0
    except OSError:
        return 0
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)
        if limit != "max":
            # Files that are only cached are given back when memory is asked for.
            free = min(free, int(limit) - used + (int(cached[1]) if cached else 0))
    except (OSError, ValueError):  # no container, or none that tells
        pass
    return max(0, free)
