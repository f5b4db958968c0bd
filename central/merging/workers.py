"""Modules side by side: one thread each, one BLAS thread in each.

In: the names of modules, what to do with one. Out: what was made of each, in the order of the
names. Guarantees: a module's bytes do not depend on the number of workers or on who ends first;
after an error no further module begins, and the error is that of the first name that failed.

Threads are enough: numpy holds no lock of the interpreter inside BLAS and LAPACK.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

import numpy as np

from central.merging.threads import one_thread

MAX_WORKERS = 8
"""Modules that are in work at once at most: each needs memory of its own."""

Made = TypeVar("Made")


def default_workers() -> int:
    """As many as this process has cores, at most MAX_WORKERS."""
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


def each(names: Sequence[str], work: Callable[[str], Made], workers: int) -> Iterator[Made]:
    """`work(name)` of every name, in order; raises what `work` raises.

    The message of a numerical error names the module.
    """
    failed = threading.Event()
    with one_thread, ThreadPoolExecutor(workers, thread_name_prefix="merging") as pool:
        # A copy of the context each: numpy's error state is in it.
        futures = [pool.submit(copy_context().run, _named, work, name, failed) for name in names]
        try:
            for future in futures:
                yield future.result()
        finally:  # without an error nothing is left to cancel
            pool.shutdown(cancel_futures=True)


def _named(work: Callable[[str], Made], name: str, failed: threading.Event) -> Made:
    if failed.is_set():  # names begin in order: an earlier one failed, and its error is raised
        raise CancelledError
    try:
        return work(name)
    except BaseException as error:
        failed.set()
        if isinstance(error, ArithmeticError | np.linalg.LinAlgError):
            raise type(error)(f"Module {name!r}: {error}") from error
        raise
