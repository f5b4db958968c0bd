"""`central tokens create | list | revoke`: who may still join.

In: arguments. Out: text or JSON, after the running central has answered.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from central.cli.options import OneCohort, running_central
from central.cli.output import print_one, print_rows, rows_of
from central.errors import CentralError
from lorikeet.program import Json

COLUMNS = ("token_id", "cohort", "state", "used", "expires_at", "nodes", "reason")

app = typer.Typer(help="Make, show and end join tokens for new nodes.")


@app.command("create")
def create(
    cohort: Annotated[str, typer.Option(help="Cohort of the nodes that join with it.")] = "shared",
    uses: Annotated[int, typer.Option(help="How many nodes may join with it.")] = 1,
    valid_hours: Annotated[float, typer.Option(help="How many hours it is valid.")] = 24.0,
    readmit: Annotated[
        str,
        typer.Option(
            metavar="NODE_ID",
            help="Let the site of a revoked node come back: with this token its name may be "
            "enrolled again, with a new key.",
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Print a new join token; it is shown only once."""
    valid_s = valid_hours * 3600
    if not (0 < uses < 2**32 and 0 < valid_s < 2**32):  # also false for nan
        raise CentralError(
            f"--uses {uses} with --valid-hours {valid_hours:g} is not possible. "
            f"Expected both above 0, below {2**32} uses and {2**32 // 3600} hours."
        )
    with running_central() as client:
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.CreateTokenRequest(
            cohort=cohort, uses=uses, valid_s=int(valid_s), readmit_node_id=readmit
        )
        answer = client.ask(client.stub.CreateToken, request)
    if as_json:
        print(json.dumps({"token": answer.token, "token_id": answer.token_id}))
    else:
        print(answer.token)


@app.command("list")
def list_tokens(cohort: OneCohort = "", as_json: Json = False) -> None:
    """Show every token, without its secret.

    It says whether the token can still be used, and who came with it.
    """
    with running_central() as client:
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.ListTokensRequest(cohort=cohort)
        rows = rows_of(client.ask(client.stub.ListTokens, request).tokens)
    if not as_json:
        for row in rows:
            row["state"] = row["state"].replace("_", " ")
            row["used"] = f"{row['used']} of {row['uses']}"
            row["nodes"] = ", ".join(row["node_ids"])
            if row["readmits"] and not row["reason"]:
                row["reason"] = f"readmits {row['readmits']}"
    print_rows(rows, COLUMNS, as_json)


@app.command("revoke")
def revoke(
    token_id: Annotated[
        str, typer.Argument(help="Its id, as `tokens list` shows it; not the token itself.")
    ],
    as_json: Json = False,
) -> None:
    """End a token: nobody joins with it any more; who did stays."""
    with running_central() as client:
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.RevokeTokenRequest(token_id=token_id)
        token = client.ask(client.stub.RevokeToken, request).token
    if as_json:
        print_one(token, as_json)
        return
    nodes = ", ".join(token.node_ids)
    stay = f" Nodes that came with it stay: {nodes}." if nodes else ""
    print(f"Token {token.token_id} is revoked: nobody joins with it any more.{stay}")
