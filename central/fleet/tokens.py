"""Join tokens: one string that lets a node enrol into one cohort.

In: cohort, uses, life. Out: the string, shown once. Guarantee: the journal keeps only the SHA-256
of the secret, and the string carries central's CA, so that a node trusts nobody else.
"""

from __future__ import annotations

import base64
import hmac
import secrets
from datetime import datetime, timedelta
from typing import Any, Literal

import grpc

from central.errors import Reason, Refused
from central.journal import EventKind, Journal, NewEvent, State, TokenRecord
from protos.manifest import canonical_json, sha256_hex

PREFIX = "lkt1."
MIN_VALID_S = 60
ID_SHOWN = 16
"""Characters of an unknown id that an error quotes.

It may be a whole token, whose secret belongs in no log.
"""
TokenState = Literal["usable", "used up", "expired", "revoked"]


def expect_sensible(uses: int, valid_s: int) -> None:
    """Raises Refused for numbers that no token should have."""
    if uses < 1 or valid_s < MIN_VALID_S:
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            Reason.BAD_ARGUMENT,
            f"A token for {uses} uses within {valid_s} s is of no use. Expected at least 1 use and "
            f"{MIN_VALID_S} s.",
        )


def create_token(
    journal: Journal,
    ca_pem: bytes,
    cohort: str,
    uses: int,
    valid_s: int,
    by: str,
    readmit: str = "",
) -> tuple[str, str]:
    """Record a new token of an existing cohort; returns its string and its id. Raises Refused.

    `by` is the operator's name. `readmit` is a revoked node, whose name may be enrolled again with
    this token.
    """
    token_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    expires_at = (
        (journal.now() + timedelta(seconds=valid_s))
        .isoformat(timespec="seconds")
        .replace("+00:00", "Z")
    )
    body: dict[str, Any] = {
        "secret_sha256": sha256_hex(secret.encode()),
        "uses": uses,
        "expires_at": expires_at,
        "by": by,
    }
    with journal.read() as state:
        if readmit:
            _expect_revoked(state, readmit)
            body["readmits"] = readmit
        journal.append(NewEvent(EventKind.TOKEN_CREATED, cohort, token_id, body))
    document = canonical_json({"id": token_id, "secret": secret, "ca": ca_pem.decode()})
    return PREFIX + base64.urlsafe_b64encode(document).decode().rstrip("="), token_id


def revoke_token(journal: Journal, token_id: str, by: str) -> TokenRecord:
    """End what is left of a token; idempotent. Raises Refused for an unknown one."""
    with journal.read() as state:
        token = state.tokens.get(token_id)
        if token is None:
            raise Refused(
                grpc.StatusCode.NOT_FOUND,
                Reason.UNKNOWN_TOKEN,
                f"Token {token_id[:ID_SHOWN]!r} is not known. Expected a token's id, not the token "
                "itself; `central tokens list` shows them.",
            )
        if not token.revoked:
            journal.append(token_revoked(token, "an operator revoked it", by))
        return state.tokens[token_id]


def token_revoked(token: TokenRecord, reason: str, by: str) -> NewEvent:
    """The event that ends a token; `by` is the operator's name."""
    return NewEvent(
        EventKind.TOKEN_REVOKED, token.cohort, token.token_id, {"reason": reason, "by": by}
    )


def token_state(token: TokenRecord, now: datetime) -> TokenState:
    """Whether a node may still enrol with it, and if not, why."""
    if token.revoked:
        return "revoked"
    if token.used >= token.uses:
        return "used up"
    return "expired" if datetime.fromisoformat(token.expires_at) <= now else "usable"


def find_token(state: State, token_id: str, secret: str) -> TokenRecord:
    """The token with this id and secret, used up or not.

    Raises Refused without saying which part is wrong.
    """
    token = state.tokens.get(token_id)
    if token is None or not hmac.compare_digest(token.secret_sha256, sha256_hex(secret.encode())):
        raise Refused(
            grpc.StatusCode.PERMISSION_DENIED,
            Reason.BAD_TOKEN,
            "The join token is not known here. Expected one that `central tokens create` of this "
            "central printed.",
        )
    return token


def expect_usable(token: TokenRecord, now: datetime) -> None:
    """Raises Refused when the token is revoked or used up, or its time is over."""
    problem = {
        "usable": "",
        "used up": f"was used {token.used} of {token.uses} times",
        "expired": f"expired at {token.expires_at}",
        "revoked": f"is revoked: {token.revoked}",
    }[token_state(token, now)]
    if problem:
        raise Refused(
            grpc.StatusCode.PERMISSION_DENIED,
            Reason.BAD_TOKEN,
            f"The join token {problem}. Ask the operator of central for a new one (`central tokens "
            "create`).",
        )


def _expect_revoked(state: State, node_id: str) -> None:
    node = state.nodes.get(node_id)
    if node is None or not node.revoked:
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            Reason.BAD_ARGUMENT,
            f"Node {node_id!r} is {'not known' if node is None else 'not revoked'}. Expected the "
            "id of a revoked node to readmit; `central nodes` shows them.",
        )
