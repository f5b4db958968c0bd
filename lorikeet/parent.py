"""A process that dies with the process that started it.

`python -S -E parent.py PARENT_PID COMMAND...` becomes COMMAND with the same pid. It is run as a
file and imports nothing of ours, so that it costs milliseconds. A pre-exec hook would fork the gRPC
threads of the process that starts it.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL for this process when its parent ends, also when the parent has ended already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
