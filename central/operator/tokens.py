"""`central tokens create | list | revoke`: who may still join.

In: arguments. Out: text or JSON, after the running central has answered. Imports nothing heavy, so
that `--help` answers at once.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from central.command import Options, asking, command, json_option, print_one, print_rows, rows_of
from central.errors import CentralError

if TYPE_CHECKING:
    from central.operator.client import OperatorClient

COLUMNS = ("token_id", "cohort", "state", "used", "expires_at", "nodes", "reason")


def add_tokens(commands: Any) -> None:
    """`central tokens`."""
    tokens = commands.add_parser("tokens", help="join tokens for new nodes", description="join tokens for new nodes")
    actions = tokens.add_subparsers(required=True, metavar="ACTION")
    create = command(actions, "create", asking(_create), "print a new join token; it is shown only once")
    create.add_argument("--cohort", default="shared", help="cohort of the nodes that join with it (default shared)")
    create.add_argument("--uses", type=int, default=1, help="how many nodes may join with it (default 1)")
    create.add_argument("--valid-hours", type=float, default=24.0, help="life in hours (default 24)")
    text = "let the site of a revoked node come back: its name may be enrolled again with this token, with a new key"
    create.add_argument("--readmit", default="", metavar="NODE_ID", help=text)
    listing = command(
        actions, "list", asking(_list), "every token, whether it can still be used, and who came with it; no secret"
    )
    listing.add_argument("--cohort", default="", help="only this cohort")
    revoke = command(actions, "revoke", asking(_revoke), "end a token: nobody joins with it any more; who did stays")
    revoke.add_argument("token_id", help="as `tokens list` shows it, not the token itself")
    for parser in (create, listing, revoke):
        json_option(parser)


def _create(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    valid_s = options.valid_hours * 3600
    if not (0 < options.uses < 2**32 and 0 < valid_s < 2**32):  # also false for nan
        raise CentralError(
            f"--uses {options.uses} with --valid-hours {options.valid_hours:g} is not possible. "
            f"Expected both above 0, below {2**32} uses and {2**32 // 3600} hours."
        )
    request = operator_pb2.CreateTokenRequest(
        cohort=options.cohort, uses=options.uses, valid_s=int(valid_s), readmit_node_id=options.readmit
    )
    answer = client.ask(client.stub.CreateToken, request)
    print(json.dumps({"token": answer.token, "token_id": answer.token_id}) if options.json else answer.token)


def _list(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    rows = rows_of(client.ask(client.stub.ListTokens, operator_pb2.ListTokensRequest(cohort=options.cohort)).tokens)
    if not options.json:
        for row in rows:
            row["state"] = row["state"].replace("_", " ")
            row["used"] = f"{row['used']} of {row['uses']}"
            row["nodes"] = ", ".join(row["node_ids"])
            row["reason"] = row["reason"] or (f"readmits {row['readmits']}" if row["readmits"] else "")
    print_rows(options, rows, COLUMNS)


def _revoke(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    token = client.ask(client.stub.RevokeToken, operator_pb2.RevokeTokenRequest(token_id=options.token_id)).token
    if options.json:
        print_one(options, token)
    else:
        stay = f" Nodes that came with it stay: {', '.join(token.node_ids)}." if token.node_ids else ""
        print(f"Token {token.token_id} is revoked: nobody joins with it any more.{stay}")
