"""Forked processes of vLLM live as long as the one that forked them, and no longer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

STORY = """
import os, time
from edge_node.serving.guard import guard_forks

guard_forks()
core = os.fork()
if core == 0:
    worker = os.fork()
    if worker == 0:
        time.sleep(0.3)  # an ill-guarded worker has ended by now
        print("worker", os.getpid(), flush=True)
        time.sleep(60)
    print("core", os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


def gone(pid: int) -> bool:
    """Not there, or a zombie that nobody has waited for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_worker_of_a_forked_core_lives_until_its_core_ends() -> None:
    server = subprocess.Popen([sys.executable, "-c", STORY], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        pids = dict(line.split() for line in (server.stdout.readline(), server.stdout.readline()))
        core, worker = int(pids["core"]), int(pids["worker"])
        assert not gone(worker)
        os.kill(core, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not gone(worker) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert gone(worker)
    finally:
        server.kill()
        server.wait(10)
