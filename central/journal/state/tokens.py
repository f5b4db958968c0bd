"""Events of join tokens: created, revoked."""

from __future__ import annotations

from dataclasses import replace

from central.journal.events import Event, EventKind
from central.journal.records import TokenRecord
from central.journal.state.expect import conflict, expect_new, known
from central.journal.state.state import State, applies


@applies(EventKind.TOKEN_CREATED)
def token_created(state: State, event: Event) -> None:
    expect_new(event, state.tokens)
    body = event.body
    token = TokenRecord(
        token_id=event.subject,
        cohort=event.cohort,
        secret_sha256=body["secret_sha256"],
        uses=body["uses"],
        expires_at=body["expires_at"],
        created_at=event.at,
        readmits=body.get("readmits", ""),
    )
    if token.readmits:
        expect_revoked(state, event, token.readmits)
    state.tokens.put(token)


@applies(EventKind.TOKEN_REVOKED)
def token_revoked(state: State, event: Event) -> None:
    token = known(event, state.tokens, event.subject, "token")
    if token.revoked or token.cohort != event.cohort:
        raise conflict(
            event,
            f"token {token.token_id} of cohort {token.cohort!r} was revoked: {token.revoked!r}",
        )
    state.tokens.put(replace(token, revoked=event.body["reason"]))


def expect_revoked(state: State, event: Event, node_id: str) -> None:
    node = known(event, state.nodes, node_id, "node")
    if not node.revoked:
        raise conflict(event, f"node {node_id} is not revoked")
