"""`central nodes list | revoke | quarantine | release`: the enrolled nodes.

In: arguments. Out: text or JSON, after the running central has answered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from central.cli.options import running_central
from central.cli.output import print_rows, print_text, rows_of
from central.printable import printable
from lorikeet.program import Json

if TYPE_CHECKING:
    from protos.operators.v1 import operators_pb2

COLUMNS = ("node_id", "cohort", "link", "last_seen", "channel", "serving", "quarantine", "problems")
NodeId = Annotated[str, typer.Argument(help="The node's id, as `central nodes` shows it.")]

app = typer.Typer()


@app.callback(invoke_without_command=True)
def nodes(context: typer.Context, as_json: Json = False) -> None:
    """Show enrolled nodes and what they report; act on one."""
    if context.invoked_subcommand is None:
        list_nodes(as_json)


@app.command("list")
def list_nodes(as_json: Json = False) -> None:
    """Show every node (the default)."""
    with running_central() as client:
        from protos.operators.v1 import operators_pb2

        answer = client.ask(client.stub.ListNodes, operators_pb2.ListNodesRequest())
    print_nodes(answer, as_json)


@app.command("revoke")
def revoke(node_id: NodeId, as_json: Json = False) -> None:
    """Refuse a node from now on.

    What is left of its join token ends too.
    """
    with running_central() as client:
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.RevokeNodeRequest(node_id=node_id)
        answer = client.ask(client.stub.RevokeNode, request)
    print_text(answer, lambda done: _revoked(node_id, done), as_json)


@app.command("quarantine")
def quarantine(
    node_id: NodeId,
    reason: Annotated[str, typer.Option(help="Why; shown to operators and to the node.")],
) -> None:
    """Keep what a node sends from being merged.

    Central still admits it. The node goes on serving and learning.
    """
    with running_central() as client:
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.QuarantineNodeRequest(node_id=node_id, reason=reason)
        kept = len(client.ask(client.stub.QuarantineNode, request).updates)
    print(
        f"Node {node_id} is in quarantine: {kept} of its updates are kept aside, and those to "
        f"come, until `central nodes release {node_id}`. It goes on serving. What was merged of it "
        "stays; `central forget` takes it out."
    )


@app.command("release")
def release(node_id: NodeId) -> None:
    """End a node's quarantine; what it sent waits to be merged."""
    with running_central() as client:
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.ReleaseNodeRequest(node_id=node_id)
        freed = len(client.ask(client.stub.ReleaseNode, request).updates)
    print(f"Node {node_id} is released: {freed} of its updates wait to be merged.")


def print_nodes(answer: operators_pb2.ListNodesResponse, as_json: bool) -> None:
    """The nodes as a table, then their problems with the next steps."""
    rows = rows_of(answer.nodes)
    for row in rows:
        row["link"] = "revoked" if row["revoked"] else "connected" if row["connected"] else "away"
        row["channel"] = row["status"]["channel"]
        row["serving"] = row["status"]["serving_release_id"][:8]
        row["problems"] = ", ".join(problem["room"] for problem in row["status"]["problems"])
        silent = row["silent_since"]
        row["evaluates"] = f"silent since {silent}, not waited for" if silent else ""
    columns = list(COLUMNS)
    if any(row["evaluates"] for row in rows):
        columns.insert(-1, "evaluates")
    print_rows(rows, columns, as_json)
    if not as_json:
        for line in [*_problems(rows), *_unusable(rows)]:
            print(printable(line))


def _problems(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        for problem in row["status"]["problems"]:
            what = f"{problem['room']}, since {problem['since']}: {problem['text']}"
            yield f"{row['node_id']}  {what}"
            yield f"    Next: {problem['next_step']}"


def _unusable(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if unusable := row["status"]["unusable_experiences"]:
            counts = (f"{count} because {reason}" for reason, count in sorted(unusable.items()))
            yield f"{row['node_id']}  answers that cannot be learnt from: {'; '.join(counts)}"


def _revoked(node_id: str, done: operators_pb2.RevokeNodeResponse) -> Iterator[str]:
    yield (
        f"Node {node_id} is revoked: neither its key nor its name is enrolled again, but for "
        f"`central tokens create --readmit {node_id}`."
    )
    if done.ended_uses:
        left = "The use" if done.ended_uses == 1 else f"The {done.ended_uses} uses"
        yield f"{left} left of the token that it came with ({done.token_id}) ended too."
    if done.other_node_ids:
        others = ", ".join(done.other_node_ids)
        yield f"Nodes that came with the same token and stay: {others}."
