"""`central updates`, `requeue` and `set-aside`: which contributions are merged, and which are not.

In: arguments. Out: text or JSON, after the running central has answered.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from central.cli.options import OneCohort, running_central
from central.cli.output import print_rows, print_standstills, rows_of
from lorikeet.program import Json

UpdateState = Literal[
    "waiting", "planned", "merged", "superseded", "set-aside", "quarantined", "forgotten"
]
COLUMNS = (
    "update_id",
    "node_id",
    "cohort",
    "sequence",
    "state",
    "rank",
    "size_bytes",
    "release_id",
    "reason",
)
Updates = Annotated[
    list[str],
    typer.Argument(metavar="UPDATE...", help="Ids, or the first 6 or more digits of each."),
]

app = typer.Typer()


@app.callback(invoke_without_command=True)
def updates(
    context: typer.Context,
    cohort: OneCohort = "",
    node: Annotated[str, typer.Option(help="Show only updates of the node with this id.")] = "",
    state: Annotated[
        UpdateState | None, typer.Option(help="Show only updates in this state.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show admitted updates and where they stand; act on some."""
    if context.invoked_subcommand is not None:
        return
    with running_central() as client:
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.ListUpdatesRequest(cohort=cohort, node_id=node)
        answer = client.ask(client.stub.ListUpdates, request)
    wanted = state.replace("-", "_") if state else ""
    print_standstills(answer.standstills, as_json)
    _print(answer.updates, as_json, wanted)


@app.command("requeue")
def requeue(updates: Updates, as_json: Json = False) -> None:
    """Let updates that are set aside wait to be merged again."""
    with running_central() as client:
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.RequeueUpdatesRequest(updates=updates)
        answer = client.ask(client.stub.RequeueUpdates, request)
    _print(answer.updates, as_json)


@app.command("set-aside")
def set_aside(
    updates: Updates,
    reason: Annotated[str, typer.Option(help="Why; shown beside the update.")],
    as_json: Json = False,
) -> None:
    """Keep updates, but do not merge them."""
    with running_central() as client:
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.SetAsideUpdatesRequest(updates=updates, reason=reason)
        answer = client.ask(client.stub.SetAsideUpdates, request)
    _print(answer.updates, as_json)


def _print(messages: Any, as_json: bool, state: str = "") -> None:
    rows = [row for row in rows_of(messages) if state in ("", row["state"])]
    if not as_json:
        for row in rows:
            row["update_id"], row["release_id"] = row["update_id"][:12], row["release_id"][:8]
    print_rows(rows, COLUMNS, as_json)
