"""vLLM's server on a socket that listens already; run with `python -m`.

In: vLLM's own arguments, and the descriptor of a listening socket (LISTEN_VARIABLE), which
doorway.py keeps open from one vLLM to the next. Out: vLLM's server. Without the variable vLLM opens
its port itself.
"""

from __future__ import annotations

import importlib
import os
import socket
from typing import Any

from edge_node.serving.command import LISTEN_VARIABLE, VLLM_ENTRY

LAUNCHER = "vllm.entrypoints.launchers.launcher"


def main() -> None:
    """Runs until vLLM ends."""
    given = os.environ.pop(LISTEN_VARIABLE, None)
    if given is not None:
        inherit(int(given))
    importlib.import_module(VLLM_ENTRY).main()


def inherit(descriptor: int) -> None:
    """From now on vLLM listens on this socket instead of one of its own."""

    def create_server_socket(addr: Any, *, reuse_port: bool) -> socket.socket:
        os.set_inheritable(descriptor, False)  # its own children need none
        return socket.socket(fileno=descriptor)

    launcher: Any = importlib.import_module(LAUNCHER)
    launcher.create_server_socket = create_server_socket


if __name__ == "__main__":
    main()
