"""`central`: the commands together, `serve`, and the exit codes.

In: arguments. Out: the process ends. Guarantees: every error of ours is one line on stderr.
Each noun has a file here; what needs a library that loads slowly is imported inside its command.
"""

from __future__ import annotations

import sys

from central import __version__
from central.cli import events, forget, journal, nodes, releases, storage, tokens, updates
from central.errors import CentralError
from central.settings import load_settings
from lorikeet.program import complain, new_program, run

app = new_program(
    "Lorikeet's central: admits updates, merges them with Flower, gates and releases. "
    "Settings are CENTRAL_* environment variables (central/settings.py).",
    __version__,
)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; ends the process."""
    try:
        sys.exit(run(app, "central", "central", arguments))
    except CentralError as error:
        complain(f"central: {error}")
        sys.exit(error.exit_code)
    except UnicodeEncodeError:
        complain(
            "central: An argument is not UTF-8 text. Expected text that this terminal can show."
        )
        sys.exit(2)


@app.command("serve")
def serve() -> None:
    """Serve nodes and operators until stopped; merge and release."""
    import asyncio
    import os

    from lorikeet.logs import log_to_stderr

    log_to_stderr()
    # Before gRPC is loaded. Its own log has a line for every failed TLS handshake, and whoever
    # reaches the port can make thousands a second.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from central.server import serve

    settings = load_settings()
    log_to_stderr(settings.logs.format)
    asyncio.run(serve(settings, lambda line: print(line, flush=True)))


app.add_typer(nodes.app, name="nodes")
app.add_typer(tokens.app, name="tokens")
app.add_typer(releases.app, name="releases")
app.add_typer(updates.app, name="updates")
app.command("forget")(forget.forget)
app.command("retention")(storage.retention)
app.command("backup")(storage.backup)
app.command("restore")(storage.restore)
app.command("events")(events.events)
app.add_typer(journal.app, name="journal")
