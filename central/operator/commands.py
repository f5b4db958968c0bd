"""`central nodes | updates | forget`: whose contributions are merged, and which are not.

In: arguments. Out: text or JSON, after the running central has answered. Imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from central.command import (
    Options,
    asking,
    command,
    json_option,
    print_rows,
    print_standstills,
    print_text,
    printable,
    rows_of,
)
from central.errors import CentralError

if TYPE_CHECKING:
    from central.operator.client import OperatorClient
    from protos.operator.v1 import operator_pb2

STATES = ("waiting", "planned", "merged", "superseded", "set_aside", "quarantined", "forgotten")
UPDATE_COLUMNS = ("update_id", "node_id", "cohort", "sequence", "state", "rank", "size_bytes", "release_id", "reason")
POLL_S = 1.0
"""How often `forget` asks what became of its order."""


def add_nodes(commands: Any) -> None:
    """`central nodes`."""
    nodes = command(commands, "nodes", asking(_nodes), "enrolled nodes and what they report")
    json_option(nodes)
    actions = nodes.add_subparsers(metavar="ACTION")
    json_option(command(actions, "list", asking(_nodes), "every node (the default)"), nested=True)
    revoke = command(
        actions, "revoke", asking(_revoke), "refuse a node from now on, and end what is left of its join token"
    )
    text = "admit what a node sends, but keep it from being merged; it goes on serving and learning"
    quarantine = command(actions, "quarantine", asking(_quarantine), text)
    quarantine.add_argument("--reason", required=True, help="shown to operators and to the node")
    release = command(actions, "release", asking(_release), "end a node's quarantine; what it sent waits to be merged")
    for parser in (revoke, quarantine, release):
        parser.add_argument("node_id")
    json_option(revoke, nested=True)


def add_updates(commands: Any) -> None:
    """`central updates`."""
    updates = command(commands, "updates", asking(_updates), "admitted updates and where they stand")
    updates.add_argument("--cohort", default="", help="only this cohort")
    updates.add_argument("--node", default="", help="only this node id")
    updates.add_argument(
        "--state", default="", choices=[state.replace("_", "-") for state in STATES], help="only these"
    )
    json_option(updates)
    actions = updates.add_subparsers(metavar="ACTION")
    requeue = command(actions, "requeue", asking(_requeue), "let updates that are set aside wait to be merged again")
    aside = command(actions, "set-aside", asking(_set_aside), "keep updates, but do not merge them")
    aside.add_argument("--reason", required=True, help="shown beside the update")
    for parser in (requeue, aside):
        parser.add_argument("updates", nargs="+", metavar="UPDATE", help="id, or its first 6 or more digits")
        json_option(parser, nested=True)


def add_forget(commands: Any) -> None:
    """`central forget`."""
    text = (
        "take a node's contributions, or one update, out of the releases: a new release is made without them, and gated"
    )
    forget = command(commands, "forget", asking(_forget), text)
    forget.add_argument(
        "target", nargs="?", default="", metavar="NODE|UPDATE", help="node id; or update id, or its first 6 digits"
    )
    forget.add_argument("--orders", action="store_true", help="list the orders so far, and where they stand")
    forget.add_argument("--dry-run", action="store_true", help="only say what would be done")
    forget.add_argument("--yes", action="store_true", help="do it: it cannot be undone")
    forget.add_argument(
        "--accept-loss", action="store_true", help="release it even if the gate finds that skill is lost"
    )
    text = "take the order under way for it back (its own id will do too); what was merged stays"
    forget.add_argument("--cancel", action="store_true", help=text)
    forget.add_argument("--no-wait", action="store_true", help="do not wait for the new release and its verdict")
    json_option(forget)


def _nodes(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    answer = client.ask(client.stub.ListNodes, operator_pb2.ListNodesRequest())
    rows = rows_of(answer.nodes)
    for row in rows:
        row["link"] = "revoked" if row["revoked"] else "connected" if row["connected"] else "away"
        row["channel"] = row["status"]["channel"]
        row["serving"] = row["status"]["serving_release_id"][:8]
        row["problems"] = ", ".join(problem["room"] for problem in row["status"]["problems"])
        row["evaluates"] = f"silent since {row['silent_since']}, not waited for" if row["silent_since"] else ""
    columns = ["node_id", "cohort", "link", "last_seen", "channel", "serving", "quarantine", "problems"]
    if any(row["evaluates"] for row in rows):
        columns.insert(-1, "evaluates")
    print_rows(options, rows, columns)
    if not options.json:
        _print_problems(rows)
        _print_unusable(rows)


def _print_problems(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for problem in row["status"]["problems"]:
            print(printable(f"{row['node_id']}  {problem['room']}, since {problem['since']}: {problem['text']}"))
            print(printable(f"    Next: {problem['next_step']}"))


def _print_unusable(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if unusable := row["status"]["unusable_experiences"]:
            reasons = "; ".join(f"{count} because {reason}" for reason, count in sorted(unusable.items()))
            print(printable(f"{row['node_id']}  answers that cannot be learnt from: {reasons}"))


def _revoke(client: OperatorClient, options: Options) -> None:
    from central.operator.texts import revoked
    from protos.operator.v1 import operator_pb2

    done = client.ask(client.stub.RevokeNode, operator_pb2.RevokeNodeRequest(node_id=options.node_id))
    print_text(options, done, lambda done: revoked(options.node_id, done))


def _quarantine(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    request = operator_pb2.QuarantineNodeRequest(node_id=options.node_id, reason=options.reason)
    kept = len(client.ask(client.stub.QuarantineNode, request).updates)
    print(
        f"Node {options.node_id} is in quarantine: {kept} of its updates are kept aside, and those to come, until "
        f"`central nodes release {options.node_id}`. It goes on serving. What was merged of it stays; `central forget` takes it out."
    )


def _release(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    answer = client.ask(client.stub.ReleaseNode, operator_pb2.ReleaseNodeRequest(node_id=options.node_id))
    print(f"Node {options.node_id} is released: {len(answer.updates)} of its updates wait to be merged.")


def _updates(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    request = operator_pb2.ListUpdatesRequest(cohort=options.cohort, node_id=options.node)
    wanted = options.state.replace("-", "_")
    answer = client.ask(client.stub.ListUpdates, request)
    rows = rows_of(answer.updates)
    print_standstills(options, answer.standstills)
    _print_updates(options, [row for row in rows if wanted in ("", row["state"])])


def _requeue(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    request = operator_pb2.RequeueUpdatesRequest(updates=options.updates)
    _print_updates(options, rows_of(client.ask(client.stub.RequeueUpdates, request).updates))


def _set_aside(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    request = operator_pb2.SetAsideUpdatesRequest(updates=options.updates, reason=options.reason)
    _print_updates(options, rows_of(client.ask(client.stub.SetAsideUpdates, request).updates))


def _print_updates(options: Options, rows: list[dict[str, Any]]) -> None:
    if not options.json:
        for row in rows:
            row["update_id"], row["release_id"] = row["update_id"][:12], row["release_id"][:8]
    print_rows(options, rows, UPDATE_COLUMNS)


def _forget(client: OperatorClient, options: Options) -> None:
    from central.operator.texts import cancelled, proposal
    from protos.operator.v1 import operator_pb2

    if options.orders == bool(options.target):
        raise CentralError("Expected a node or an update to forget, or --orders for the orders so far; not both.")
    if options.orders:
        _print_orders(options, client)
        return
    if options.cancel:
        order = client.ask(client.stub.Forget, operator_pb2.ForgetRequest(target=options.target, cancel=True)).order
        print_text(options, order, cancelled)
        return
    request = operator_pb2.ForgetRequest(
        target=options.target, accept_loss=options.accept_loss, dry_run=not options.yes
    )
    if options.dry_run:
        request.dry_run = True
    order = client.ask(client.stub.Forget, request).order
    if not options.json or request.dry_run:
        print_text(options, order, proposal)
    if request.dry_run:
        if not options.dry_run:
            raise CentralError(
                "Nothing was changed. It cannot be undone: repeat with --yes, or with --dry-run to only look."
            )
        return
    if not options.no_wait:
        order = _await_end(client, options, order)
    if options.json:
        print(json.dumps(rows_of([order])[0], indent=2))
    _expect_done(order, options)


def _await_end(client: OperatorClient, options: Options, order: operator_pb2.ForgetOrder) -> operator_pb2.ForgetOrder:
    """The order once it is over; says on the way what happens. The order stands, whether somebody waits for it or not."""
    from central.operator.texts import progress
    from protos.operator.v1 import operator_pb2

    under_way = (operator_pb2.FORGET_STATE_ORDERED, operator_pb2.FORGET_STATE_PLANNED)
    said = ""
    while order.state in under_way:
        time.sleep(POLL_S)
        orders = client.ask(client.stub.ListForgets, operator_pb2.ListForgetsRequest()).orders
        order = next(other for other in orders if other.order_id == order.order_id)
        if (line := printable(progress(order))) != said and not options.json:
            print(line, flush=True)
            said = line
    return order


def _expect_done(order: operator_pb2.ForgetOrder, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    if order.state == operator_pb2.FORGET_STATE_REJECTED:
        raise CentralError(
            f"{order.candidate or 'The release without it'} was {order.verdict} What was merged is still there. If this skill may be "
            "lost with the contribution, repeat with --accept-loss."
        )
    if order.state == operator_pb2.FORGET_STATE_FAILED:
        why = order.verdict.rstrip(".")
        raise CentralError(f"The order ended without a release: {why}. What was merged is still there.")


def _print_orders(options: Options, client: OperatorClient) -> None:
    from protos.operator.v1 import operator_pb2

    rows = rows_of(client.ask(client.stub.ListForgets, operator_pb2.ListForgetsRequest()).orders)
    if not options.json:
        for row in rows:
            row["order"], row["updates"] = row["order_id"][:8], len(row["in_release"]) + len(row["unreleased"])
            row["verdict"] = row["verdict"].partition(". ")[0]
    columns = ["order", "at", "by", "cohort", "node_id", "updates", "state", "candidate", "verdict"]
    if any(row["waits_for"] for row in rows):
        columns.append("waits_for")
    print_rows(options, rows, columns)
