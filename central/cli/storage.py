"""`central retention | backup | restore`: what lies on disk.

In: arguments. Out: text or JSON; a progress bar on stderr where that is a terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from central import faults
from central.cli.options import running_central
from central.cli.output import print_rows, rows_of
from central.settings import load_settings
from lorikeet.program import Json

COLLECT_TIMEOUT_S = 24 * 3600.0
"""Deleting many objects takes long; when the command is stopped, central goes on."""


def retention(
    apply: Annotated[
        bool, typer.Option("--apply", help="Delete them. Without it, only list them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List or delete payloads that nothing needs any more.

    The journal says why each one is gone.
    """
    with running_central() as client:
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.CollectBlobsRequest(apply=apply)
        answer = client.ask(client.stub.CollectBlobs, request, COLLECT_TIMEOUT_S)
    if as_json:
        print(json.dumps(rows_of([answer])[0], indent=2))
        return
    rows = rows_of(answer.blobs)
    for row in rows:
        row["payload"] = row["digest"][:12]
    if rows:
        print_rows(rows, ("payload", "size_bytes", "reason"), as_json)
    done = "Deleted" if apply else "Would delete"
    advice = "" if apply or not answer.total_bytes else " Do it with --apply."
    print(
        f"{done} {len(rows)} payloads and {answer.uploads} unfinished uploads, "
        f"{answer.total_bytes} bytes together.{advice}"
    )


def backup(
    directory: Annotated[Path, typer.Argument(help="A new, empty one, or with earlier backups.")],
    without_keys: Annotated[
        bool,
        typer.Option(
            "--without-keys",
            help="Leave the private keys out. Keep them elsewhere: nodes trust no others.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy journal, payloads and keys into a directory.

    Central may run or not. A repeat copies only new payloads.
    """
    from central.backup.backup import back_up

    settings = load_settings()
    faults.arm()
    done = back_up(settings, directory, not without_keys, _bar("blobs"))
    manifest = done.manifest
    if as_json:
        print(json.dumps({"path": str(done.path), "copied": done.copied, **manifest.model_dump()}))
        return
    with_keys = "with the private keys: guard it like them"
    keys = with_keys if manifest.has_keys else "without the private keys"
    print(
        f"Backup {done.path}: {manifest.events} events, {manifest.blobs} payloads with "
        f"{manifest.blob_bytes} bytes ({done.copied} of them new), {keys}."
    )


def restore(
    directory: Annotated[Path, typer.Argument(help="Where `central backup` wrote to.")],
    backup: Annotated[
        str | None, typer.Option(metavar="NAME", help="One of its backups, if not the newest.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only check the backup, every payload of it.")
    ] = False,
    accept_loss: Annotated[
        bool,
        typer.Option(
            "--accept-loss",
            help="Restore also when events are then lost that central recorded after the backup "
            "(the blob store or journal.head knows of them).",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Fill an empty data directory and database from a backup.

    Central must not run.
    """
    from central.backup.restore import check_backup, open_backup, restore

    settings = load_settings()
    faults.arm()
    source = open_backup(directory, backup)
    if check:
        check_backup(source, _bar("blobs checked"))
    else:
        restore(settings, source, _bar("blobs"), accept_loss)
    manifest = source.manifest
    if as_json:
        said = {"path": str(source.path), "restored": not check, **manifest.model_dump()}
        print(json.dumps(said))
        return
    whole = f"Backup {source.path} of {manifest.created_at} is whole"
    what = whole if check else f"Restored {source.path} to {settings.data_dir}"
    print(
        f"{what}: {manifest.events} events, {manifest.blobs} payloads with "
        f"{manifest.blob_bytes} bytes, each one checked."
    )


def _bar(text: str) -> Any:
    @contextmanager
    def shown(digests: Iterable[str], count: int) -> Iterator[Iterable[str]]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            yield progress.track(digests, total=count)

    return shown
