"""`central events`: what the journal holds, as the running central tells it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from central.cli.options import running_central
from central.cli.output import print_rows, rows_of
from central.errors import CentralError
from lorikeet.program import Json

COLUMNS = ("sequence", "at", "cohort", "kind", "subject")


def events(
    after: Annotated[int, typer.Option(help="Show events after this number.")] = 0,
    limit: Annotated[int, typer.Option(help="Show at most this many.")] = 1000,
    as_json: Json = False,
) -> None:
    """Show the journal's events."""
    if not 0 <= after < 2**63 or not 0 < limit < 2**32:
        raise CentralError(
            f"--after {after} with --limit {limit} is not possible. Expected --after 0 to "
            f"{2**63 - 1} and --limit at least 1."
        )
    with running_central() as client:
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.ListEventsRequest(after=after, limit=limit)
        rows = rows_of(client.ask(client.stub.ListEvents, request).events)
    if as_json:
        for row in rows:
            row["body"] = json.loads(row["body"])
    print_rows(rows, COLUMNS, as_json)
