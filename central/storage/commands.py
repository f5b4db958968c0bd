"""`central backup | restore | retention`.

In: arguments. Out: text or JSON; a progress bar on stderr where that is a terminal. Imports nothing heavy, so that `--help` answers
at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from central import faults
from central.command import Options, asking, command, json_option, print_rows, rows_of
from central.settings import CentralSettings

if TYPE_CHECKING:
    from central.operator.client import OperatorClient

COLLECT_TIMEOUT_S = 24 * 3600.0
"""Deleting many objects takes long; when the command is stopped, central goes on."""


def add_retention(commands: Any) -> None:
    """`central retention`."""
    text = "payloads that nothing needs any more: list them, or delete them; the journal says why each one is gone"
    retention = command(commands, "retention", asking(_retention), text)
    retention.add_argument("--apply", action="store_true", help="delete them (default: only list them)")
    json_option(retention)


def add_backup(commands: Any) -> None:
    """`central backup`."""
    text = "copy journal, payloads and keys into a directory; central may run or not; a repeat copies only new payloads"
    backup = command(commands, "backup", _backup, text)
    backup.add_argument("directory", type=Path, help="new, empty, or with earlier backups")
    backup.add_argument(
        "--without-keys",
        action="store_true",
        help="leave the private keys out; keep them elsewhere, nodes trust no others",
    )
    json_option(backup)


def add_restore(commands: Any) -> None:
    """`central restore`."""
    text = "make an empty data directory and database those of a backup; central must not run"
    restore = command(commands, "restore", _restore, text)
    restore.add_argument("directory", type=Path, help="where `central backup` wrote to")
    restore.add_argument("--backup", metavar="NAME", help="one of its backups (default: the newest)")
    restore.add_argument("--check", action="store_true", help="only check the backup, every payload of it")
    text = "also when central recorded events after the backup that are then lost (the blob store or journal.head knows of them)"
    restore.add_argument("--accept-loss", action="store_true", help=text)
    json_option(restore)


def _backup(settings: CentralSettings, options: Options) -> None:
    from central.storage.backup import back_up

    faults.arm()
    done = back_up(settings, options.directory, not options.without_keys, _bar("blobs"))
    manifest = done.manifest
    if options.json:
        print(json.dumps({"path": str(done.path), "copied": done.copied, **manifest.model_dump()}))
        return
    keys = "with the private keys: guard it like them" if manifest.has_keys else "without the private keys"
    print(
        f"Backup {done.path}: {manifest.events} events, {manifest.blobs} payloads with {manifest.blob_bytes} bytes "
        f"({done.copied} of them new), {keys}."
    )


def _restore(settings: CentralSettings, options: Options) -> None:
    from central.storage.restore import check_backup, open_backup, restore

    faults.arm()
    source = open_backup(options.directory, options.backup)
    if options.check:
        check_backup(source, _bar("blobs checked"))
    else:
        restore(settings, source, _bar("blobs"), options.accept_loss)
    manifest = source.manifest
    if options.json:
        print(json.dumps({"path": str(source.path), "restored": not options.check, **manifest.model_dump()}))
        return
    what = (
        f"Backup {source.path} of {manifest.created_at} is whole"
        if options.check
        else f"Restored {source.path} to {settings.data_dir}"
    )
    print(
        f"{what}: {manifest.events} events, {manifest.blobs} payloads with {manifest.blob_bytes} bytes, each one checked."
    )


def _bar(text: str) -> Any:
    @contextmanager
    def shown(digests: Iterable[str], count: int) -> Iterator[Iterable[str]]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            yield progress.track(digests, total=count)

    return shown


def _retention(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    request = operator_pb2.CollectBlobsRequest(apply=options.apply)
    answer = client.ask(client.stub.CollectBlobs, request, COLLECT_TIMEOUT_S)
    if options.json:
        print(json.dumps(rows_of([answer])[0], indent=2))
        return
    rows = rows_of(answer.blobs)
    for row in rows:
        row["payload"] = row["digest"][:12]
    if rows:
        print_rows(options, rows, ("payload", "size_bytes", "reason"))
    done = "Deleted" if options.apply else "Would delete"
    print(
        f"{done} {len(rows)} payloads and {answer.uploads} unfinished uploads, {answer.total_bytes} bytes together."
        + ("" if options.apply or not answer.total_bytes else " Do it with --apply.")
    )
