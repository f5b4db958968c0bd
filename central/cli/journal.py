"""`central journal verify | accept-loss`: the journal on disk.

In: arguments. Out: text or JSON.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from central import faults
from central.errors import CentralError
from central.settings import load_settings
from lorikeet.program import Json

MAX_NAMED = 5
"""Blobs that the text names."""

app = typer.Typer(help="Check the journal on disk.")


@app.command("verify")
def verify(as_json: Json = False) -> None:
    """Read the whole journal again and check it.

    It checks the hash chain, every signature, and that the end is there; it lists blobs that no
    event names. It writes nothing. Central may run or not.
    """
    from central.blobs import open_blobs
    from central.history import unnamed_blobs, verify_history

    settings = load_settings()
    store = open_blobs(settings)
    state = verify_history(settings.data_dir, settings.journal_url, store, signatures=True)
    digest = state.last_hash if state.sequence else ""
    unnamed = unnamed_blobs(state, store)
    if as_json:
        print(json.dumps({"events": state.sequence, "hash": digest, "unnamed_blobs": unnamed}))
        return
    last = digest or "none"
    print(f"The journal is whole: {state.sequence} events, the last one with hash {last}.")
    if unnamed:
        named = ", ".join(unnamed[:MAX_NAMED]) + (", ..." if len(unnamed) > MAX_NAMED else "")
        print(
            f"Blobs that no event names: {len(unnamed)} ({named}). An upload that is interrupted "
            "leaves one until the node goes on. Nothing deletes them; --json lists them all."
        )


@app.command("accept-loss")
def accept_loss(
    yes: Annotated[
        bool,
        typer.Option(
            "--yes",
            help="Do it: the missing events are given up. Without it, only say what is missing.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Go on without events that central once recorded.

    For a journal that was lost or is an older one. Central must not run.
    """
    from central.loss import accept_loss

    settings = load_settings()
    faults.arm()
    missing = accept_loss(settings, yes)
    if as_json:
        print(json.dumps({"missing": missing, "accepted": bool(missing) and yes}))
    elif not missing:
        print("Nothing is missing of the journal; nothing was changed.")
    elif yes:
        print(f"{missing} This is accepted: central goes on from the journal as it is.")
    if missing and not yes:
        raise CentralError(
            f"{missing} Nothing was changed. Restore the newest backup if there is one. To give "
            "the missing events up for good, repeat with --yes."
        )
