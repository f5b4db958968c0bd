"""Benchmarks: each module of this folder prints the figures that the documentation names.

In: a seed. Out: one JSON object per module.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

# Every method is timed on one core. BLAS reads these when numpy or torch is first imported, which
# is after this.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"


def describe_machine() -> dict[str, object]:
    """What a figure was measured on: processor, cores, memory, load and software."""
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    memory = meminfo.read_text().split()[1] if meminfo.exists() else "0"
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(int(memory) / 2**20, 1),
        "load_at_start": round(os.getloadavg()[0], 1),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def peak_rss_mb(pid: int | str = "self") -> float:
    """The largest resident set of a process so far.

    Not ru_maxrss, which also counts what the parent held before the start.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024, 1)
