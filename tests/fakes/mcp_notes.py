"""A server of MCP: notes in its working directory. `python -m tests.fakes.mcp_notes`."""

from __future__ import annotations

import os
import time
from pathlib import Path

from mcp.server import MCPServer

server = MCPServer("notes")


@server.tool()
def read(name: str) -> str:
    """The text of a note."""
    return Path(name).read_text()


@server.tool()
def write(name: str, text: str) -> str:
    """Write a note."""
    Path(name).write_text(text)
    return "written"


@server.tool()
def end(how: str) -> str:
    """End the server, or hang."""
    if how == "hang":
        time.sleep(3600)
    os._exit(1)


if __name__ == "__main__":
    server.run("stdio")
