"""One BLAS thread: how many threads share a product of matrices changes its last bits.

In: nothing. Out: a context. Guarantee: inside it numpy's OpenBLAS computes with one thread,
whatever OMP_NUM_THREADS and OPENBLAS_NUM_THREADS say, in every thread of this process until the
last one has left; then it is as it was.

Limit: OpenBLAS as numpy's wheels bring it. Another BLAS (a numpy from elsewhere) is left as the
environment wants it.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from types import TracebackType

_SET, _GET = "scipy_openblas_set_num_threads64_", "scipy_openblas_get_num_threads64_"


class OneThread:
    """Hold OpenBLAS to one thread; enter it as often as wanted, from any thread.

    OpenBLAS has one number for the whole process. The first to come sets it and the last to leave
    sets it back. So between two merges at once there is no gap with another number.
    """

    def __init__(self) -> None:
        # What numpy's extension is linked to is found through it.
        library = ctypes.CDLL(importlib.import_module("numpy._core._multiarray_umath").__file__)
        self._library = library if hasattr(library, _SET) else None
        self._lock = threading.Lock()
        self._inside = 0
        self._before = 0

    @property
    def threads(self) -> int:
        """How many BLAS threads there are now; 0 for a BLAS that cannot be asked."""
        return int(getattr(self._library, _GET)()) if self._library else 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = self.threads
                self._set(1)
            self._inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._set(self._before)

    def _set(self, threads: int) -> None:
        if self._library:
            getattr(self._library, _SET)(threads)


one_thread = OneThread()
