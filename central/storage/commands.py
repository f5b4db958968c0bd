"""`central retention`: what may be deleted, and deleting it.

In: arguments. Out: text or JSON. Imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from central.command import Options, asking, command, json_option, print_rows, rows_of

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
