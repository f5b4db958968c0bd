"""`central journal verify | accept-loss`: the journal on disk.

In: arguments. Out: text or JSON. Imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from typing import Any

from central import faults
from central.command import Options, command, json_option
from central.errors import CentralError
from central.settings import CentralSettings

MAX_NAMED = 5
"""Blobs that the text names."""


def add_journal(commands: Any) -> None:
    """`central journal`."""
    journal = commands.add_parser("journal", help="check the journal on disk", description="the journal on disk")
    actions = journal.add_subparsers(required=True, metavar="ACTION")
    text = (
        "re-read every event; check the hash chain, every signature, and that the end is there; "
        "list blobs that no event names; writes nothing, central may run or not"
    )
    json_option(command(actions, "verify", _verify, text))
    text = (
        "go on without events that central once recorded: the journal was lost or is an older one; central must not run"
    )
    accept = command(actions, "accept-loss", _accept_loss, text)
    accept.add_argument(
        "--yes", action="store_true", help="do it: the missing events are given up (default: only say what is missing)"
    )
    json_option(accept)


def _verify(settings: CentralSettings, options: Options) -> None:
    from central.history import unnamed_blobs, verify_history
    from central.registry import open_blobs

    store = open_blobs(settings)
    state = verify_history(settings.data_dir, settings.journal_url, store, signatures=True)
    digest = state.last_hash if state.sequence else ""
    unnamed = unnamed_blobs(state, store)
    if options.json:
        print(json.dumps({"events": state.sequence, "hash": digest, "unnamed_blobs": unnamed}))
        return
    print(f"The journal is whole: {state.sequence} events, the last one with hash {digest or 'none'}.")
    if unnamed:
        named = ", ".join(unnamed[:MAX_NAMED]) + (", ..." if len(unnamed) > MAX_NAMED else "")
        print(
            f"Blobs that no event names: {len(unnamed)} ({named}). An upload that is interrupted "
            "leaves one until the node goes on. Nothing deletes them; --json lists them all."
        )


def _accept_loss(settings: CentralSettings, options: Options) -> None:
    from central.loss import accept_loss

    faults.arm()
    missing = accept_loss(settings, options.yes)
    if options.json:
        print(json.dumps({"missing": missing, "accepted": bool(missing) and options.yes}))
    elif not missing:
        print("Nothing is missing of the journal; nothing was changed.")
    elif options.yes:
        print(f"{missing} This is accepted: central goes on from the journal as it is.")
    if missing and not options.yes:
        raise CentralError(
            f"{missing} Nothing was changed. Restore the newest backup if there is one. To give "
            "the missing events up for good, repeat with --yes."
        )
