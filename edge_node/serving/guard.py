"""A `vllm.general_plugins` entry point that every vLLM process runs at its start.

In: nothing. Out: a process that knows our model classes and dies with its parent. On CPU it has the
adapters' arithmetic of cpu_lora.py. On one-thread CPU hosts its engine core is forked instead of
imported a second time. Guarantees: a `kill -9` of any parent leaves no vLLM process behind; a vLLM
whose LoRA on CPU differs ends at its start.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from typing import Any

from edge_node.logs import log_beside_vllm
from edge_node.serving import language_model
from lorikeet.parent import die_with_parent

logger = logging.getLogger(__name__)


def guard_process() -> None:
    """Runs in the API server, and in each engine core and worker that was spawned."""
    log_beside_vllm()
    language_model.register()
    replace_cpu_lora()
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        die_with_parent(parent.pid)
    elif os.environ.get("OMP_NUM_THREADS") == "1":
        fork_engine_core()


def replace_cpu_lora() -> None:
    """Runs in each vLLM process, as any may run the model; its ServingError ends vLLM."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from edge_node.serving import cpu_lora

        cpu_lora.install(type(current_platform))


def fork_engine_core() -> None:
    """Lets vLLM fork its engine core on CPU.

    vLLM forces `spawn` there, and the engine core imports everything again. Measured: 18.3 against
    13.7 CPU-seconds, and 1,072 against 846 MB, per start. Forking is safe only while no OpenMP pool
    exists, hence OMP_NUM_THREADS=1.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    platform: Any = type(current_platform)
    original = platform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    platform.check_and_update_config = classmethod(check_and_update_config)
    logger.info("Engine core will be forked")
    guard_forks()


def guard_forks() -> None:
    """Each process forked from now on dies with its parent, also the worker of a forked core."""
    forking_pid = os.getpid()

    def remember() -> None:
        nonlocal forking_pid
        forking_pid = os.getpid()

    def guard_fork() -> None:
        # This descriptor wakes the parent's event loop: a child's signal must not reach it.
        signal.set_wakeup_fd(-1)
        die_with_parent(forking_pid)

    os.register_at_fork(before=remember, after_in_child=guard_fork)
