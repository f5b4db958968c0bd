"""Join tokens: one string that lets a node enrol into one cohort.

In: cohort, uses, life. Out: the string, shown once. Guarantee: the journal keeps only the SHA-256 of the secret, and
the string carries central's CA, so that a node trusts nobody else.
"""

from __future__ import annotations

import base64
import hmac
import secrets
from datetime import datetime, timedelta

import grpc

from central.errors import Reason, Refused
from central.journal import EventKind, Journal, NewEvent, State, TokenRecord
from protos.manifest import canonical_json, sha256_hex

PREFIX = "lkt1."
MIN_VALID_S = 60


def expect_sensible(uses: int, valid_s: int) -> None:
    """Raises Refused for numbers that no token should have."""
    if uses < 1 or valid_s < MIN_VALID_S:
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            Reason.BAD_ARGUMENT,
            f"A token for {uses} uses within {valid_s} s is of no use. Expected at least 1 use and {MIN_VALID_S} s.",
        )


def create_token(journal: Journal, ca_pem: bytes, cohort: str, uses: int, valid_s: int, by: str) -> str:
    """Record a new token of an existing cohort and return its string; `by` is the operator's name."""
    token_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    expires_at = (journal.now() + timedelta(seconds=valid_s)).isoformat(timespec="seconds").replace("+00:00", "Z")
    body = {"secret_sha256": sha256_hex(secret.encode()), "uses": uses, "expires_at": expires_at, "by": by}
    journal.append(NewEvent(EventKind.TOKEN_CREATED, cohort, token_id, body))
    document = canonical_json({"id": token_id, "secret": secret, "ca": ca_pem.decode()})
    return PREFIX + base64.urlsafe_b64encode(document).decode().rstrip("=")


def find_token(state: State, token_id: str, secret: str) -> TokenRecord:
    """The token with this id and secret, used up or not; raises Refused without saying which part is wrong."""
    token = state.tokens.get(token_id)
    if token is None or not hmac.compare_digest(token.secret_sha256, sha256_hex(secret.encode())):
        raise Refused(
            grpc.StatusCode.PERMISSION_DENIED,
            Reason.BAD_TOKEN,
            "The join token is not known here. Expected one that `central tokens create` of this central printed.",
        )
    return token


def expect_usable(token: TokenRecord, now: datetime) -> None:
    """Raises Refused when the token is used up or its time is over."""
    expired = datetime.fromisoformat(token.expires_at) <= now
    if expired or token.used >= token.uses:
        problem = f"expired at {token.expires_at}" if expired else f"was used {token.used} of {token.uses} times"
        raise Refused(
            grpc.StatusCode.PERMISSION_DENIED,
            Reason.BAD_TOKEN,
            f"The join token {problem}. Ask the operator of central for a new one (`central tokens create`).",
        )
