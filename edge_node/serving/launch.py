"""Starts a command that dies with the process that started it.

In: `python -S -E launch.py PARENT_PID COMMAND...`. Out: COMMAND in this process (same pid). A file of its own, without
imports of ours, so that it costs milliseconds; a pre-exec hook in the supervisor would fork its gRPC threads instead.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
    os.execv(sys.argv[2], sys.argv[2:])
