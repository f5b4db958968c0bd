"""What a journal implies, as one JSON value: it does not depend on how the state is built inside.

In: a state. Out: its records by name. Guarantee: the same records give the same value, to the byte.
"""

from __future__ import annotations

import base64
from dataclasses import is_dataclass
from typing import Any

from pydantic import BaseModel

from central.journal import State

RECORDS = (
    "sequence",
    "last_hash",
    "tokens",
    "nodes",
    "updates",
    "plans",
    "releases",
    "channels",
    "channel_changes",
    "train_offers",
    "builds_on",
    "compositions",
    "canary_reports",
    "evaluations",
    "isolations",
    "forgets",
    "serving",
    "served",
    "collected",
    "collections",
)


def implied(state: State) -> dict[str, Any]:
    """Every record, and what central asks at every start, of all cohorts and nodes."""
    found: dict[str, Any] = {name: _plain(getattr(state, name)) for name in RECORDS}
    found["waiting"] = {c: [u.update_id for u in state.waiting(c)] for c in state.cohorts()}
    found["kept_bytes"] = {node: state.kept_bytes(node) for node in state.nodes}
    found["forgotten_in"] = {release: state.forgotten_in(release) for release in state.releases}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(field) for name, field in vars(value).items()}
    if isinstance(value, dict):
        return {_key(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _key(key: Any) -> str:
    return "/".join(key) if isinstance(key, tuple) else str(key)
