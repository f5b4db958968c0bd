"""`central forget`: take a contribution out of the releases.

In: arguments. Out: text or JSON, after the running central has answered, and usually after the new
release has its verdict. Guarantees: the order stands, whether somebody waits for it or not.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from central.cli.options import running_central
from central.cli.output import print_rows, print_text, rows_of
from central.errors import CentralError
from central.printable import printable
from lorikeet.program import Json

if TYPE_CHECKING:
    from central.operators.client import OperatorClient
    from protos.operators.v1 import operators_pb2

POLL_S = 1.0
"""How often `forget` asks what became of its order."""
COLUMNS = ("order", "at", "by", "cohort", "node_id", "updates", "state", "candidate", "verdict")


def forget(
    target: Annotated[
        str,
        typer.Argument(
            metavar="[NODE|UPDATE]",
            show_default=False,
            help="A node's id; or an update's id, or the first 6 digits of it.",
        ),
    ] = "",
    orders: Annotated[
        bool, typer.Option("--orders", help="Show the orders so far, and where they stand.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; it cannot be undone.")] = False,
    accept_loss: Annotated[
        bool,
        typer.Option("--accept-loss", help="Release it even if the gate finds that skill is lost."),
    ] = False,
    cancel: Annotated[
        bool,
        typer.Option(
            "--cancel",
            help="Take the order under way for it back (the order's own id will do too). "
            "What was merged stays.",
        ),
    ] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Do not wait for the new release and its verdict.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Take contributions of a node, or an update, out.

    Central makes a new release without them, and the gate judges it.
    """
    if orders == bool(target):
        raise CentralError(
            "Expected a node or an update to forget, or --orders for the orders so far; not both."
        )
    with running_central() as client:
        if orders:
            _print_orders(client, as_json)
        elif cancel:
            _cancel(client, target, as_json)
        elif dry_run or not yes:
            _propose(client, target, accept_loss, as_json)
        else:
            _order(client, target, accept_loss, not no_wait, as_json)
    if not (orders or cancel or dry_run or yes):
        raise CentralError(
            "Nothing was changed. It cannot be undone: repeat with --yes, or with --dry-run to "
            "only look."
        )


def _cancel(client: OperatorClient, target: str, as_json: bool) -> None:
    from central.cli.forget_texts import cancelled
    from protos.operators.v1 import operators_pb2

    request = operators_pb2.ForgetRequest(target=target, cancel=True)
    print_text(client.ask(client.stub.Forget, request).order, cancelled, as_json)


def _propose(client: OperatorClient, target: str, accept_loss: bool, as_json: bool) -> None:
    from central.cli.forget_texts import proposal
    from protos.operators.v1 import operators_pb2

    request = operators_pb2.ForgetRequest(target=target, accept_loss=accept_loss, dry_run=True)
    print_text(client.ask(client.stub.Forget, request).order, proposal, as_json)


def _order(
    client: OperatorClient, target: str, accept_loss: bool, wait: bool, as_json: bool
) -> None:
    from central.cli.forget_texts import proposal
    from protos.operators.v1 import operators_pb2

    request = operators_pb2.ForgetRequest(target=target, accept_loss=accept_loss)
    order = client.ask(client.stub.Forget, request).order
    if not as_json:
        print_text(order, proposal, as_json)
    if wait:
        order = _await_end(client, order, as_json)
    if as_json:
        print(json.dumps(rows_of([order])[0], indent=2))
    _expect_done(order)


def _await_end(
    client: OperatorClient, order: operators_pb2.ForgetOrder, as_json: bool
) -> operators_pb2.ForgetOrder:
    """The order once it is over; says on the way what happens."""
    from central.cli.forget_texts import progress
    from protos.operators.v1 import operators_pb2

    under_way = (operators_pb2.FORGET_STATE_ORDERED, operators_pb2.FORGET_STATE_PLANNED)
    said = ""
    while order.state in under_way:
        time.sleep(POLL_S)
        orders = client.ask(client.stub.ListForgets, operators_pb2.ListForgetsRequest()).orders
        order = next(other for other in orders if other.order_id == order.order_id)
        if (line := printable(progress(order))) != said and not as_json:
            print(line, flush=True)
            said = line
    return order


def _expect_done(order: operators_pb2.ForgetOrder) -> None:
    from protos.operators.v1 import operators_pb2

    if order.state == operators_pb2.FORGET_STATE_REJECTED:
        raise CentralError(
            f"{order.candidate or 'The release without it'} was {order.verdict} What was merged is "
            "still there. If this skill may be lost with the contribution, repeat with "
            "--accept-loss."
        )
    if order.state == operators_pb2.FORGET_STATE_FAILED:
        why = order.verdict.rstrip(".")
        raise CentralError(
            f"The order ended without a release: {why}. What was merged is still there."
        )


def _print_orders(client: OperatorClient, as_json: bool) -> None:
    from protos.operators.v1 import operators_pb2

    rows = rows_of(client.ask(client.stub.ListForgets, operators_pb2.ListForgetsRequest()).orders)
    if not as_json:
        for row in rows:
            row["order"] = row["order_id"][:8]
            row["updates"] = len(row["in_release"]) + len(row["unreleased"])
            row["verdict"] = row["verdict"].partition(". ")[0]
    columns = [*COLUMNS, *(["waits_for"] if any(row["waits_for"] for row in rows) else [])]
    print_rows(rows, columns, as_json)
