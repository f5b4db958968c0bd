"""What `edge-node status` says beside the stores' counts: engine, aliases, keys, queues, last sync.

In: settings, what vLLM's process says of itself. Out: plain values, and lines for people, in colour
where the terminal has it. Imports nothing heavy.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import typer

from edge_node.access import keys_file, read_keys
from edge_node.errors import EdgeError
from edge_node.figures.tally import last_heard
from edge_node.heartbeat import is_alive
from edge_node.outbox import Outbox
from edge_node.serving import ControlState
from edge_node.settings import EdgeSettings

SILENT_S = 15.0
"""An engine that made no token for longer is told as silent."""
WIDTH = 24
GOOD, BAD, DOUBTFUL = "green", "red", "yellow"


def engine_status(settings: EdgeSettings, state: ControlState | None) -> dict[str, Any]:
    """`state`: None when vLLM's process does not answer."""
    engine: dict[str, Any] = {"supervisor": "alive" if is_alive(settings.data_dir) else "away"}
    if state is None:
        return {"engine": engine | {"state": "away"}, "aliases": {}}
    word = (
        "draining" if state.draining
        else "silent" if state.silent_s > SILENT_S
        else "serving" if state.not_ready is None
        else "not ready"
    )  # fmt: skip
    engine |= {"state": word, "in_flight": state.users_in_flight(), "silent_s": state.silent_s}
    return {"engine": engine, "aliases": {state.alias: state.target}}


def kept_status(settings: EdgeSettings, *, busy_timeout_s: float) -> dict[str, Any]:
    """Keys, what waits to leave, and when central was heard last; None where nobody knows."""
    heard = last_heard(settings.data_dir)
    at = None if heard is None else datetime.fromtimestamp(heard, UTC)
    return {
        "keys": _keys(settings),
        "queues": _queues(settings, busy_timeout_s),
        "channel": settings.releases.channel,
        "last_sync": at and at.isoformat(timespec="seconds"),
    }


def _keys(settings: EdgeSettings) -> dict[str, Any] | None:
    try:
        keys = read_keys(keys_file(settings))
    except FileNotFoundError:
        keys = ()
    except EdgeError:  # the problem `access` says so
        return None
    valid = [key for key in keys if key.revoked is None]
    scopes = {str(scope): sum(scope in key.scopes for key in valid) for key in valid
              for scope in key.scopes}  # fmt: skip
    revoked = len(keys) - len(valid)
    return {"access": settings.serving.access, "valid": len(valid), "revoked": revoked} | scopes


def _queues(settings: EdgeSettings, busy_timeout_s: float) -> dict[str, Any] | None:
    """Updates that have not left this node."""
    folder = settings.data_dir / "outbox"
    try:
        outbox = Outbox(folder, settings.outbox.approval, busy_timeout_s=busy_timeout_s)
        unsent = [entry for entry in outbox.list() if entry.state in ("waiting", "held")]
        files = [outbox.payload_path(entry.round_id) for entry in unsent]
        size = sum(file.stat().st_size for file in files if file.exists())
    except (EdgeError, OSError, sqlite3.Error, ValueError):  # the problem `outbox` says so
        return None
    oldest = min((entry.created_at for entry in unsent), default=None)
    return {"updates": len(unsent), "bytes": size, "oldest": oldest}


def print_status(status: Mapping[str, Any], now: datetime | None = None) -> None:
    """For people. Without a terminal, or with NO_COLOR, there is no colour."""
    color = False if os.environ.get("NO_COLOR") else None
    for line in lines(status, now or datetime.now(UTC)):
        typer.echo(line, color=color)


def lines(status: Mapping[str, Any], now: datetime) -> Iterator[str]:
    """A line a value, the problems last."""
    for key, value in status.items():
        if key == "versions":
            for name, counts in value.items():
                yield f"{'answers of ' + name:{WIDTH}} {_named(counts)}"
        elif key != "problems":
            yield f"{key.replace('_', ' '):{WIDTH}}{_coloured(key, value, now)}"
    problems = status["problems"]
    number = typer.style(str(len(problems)), BAD) if problems else typer.style("none", GOOD)
    yield f"{'problems':{WIDTH}}{number}"
    for problem in problems:
        room = typer.style(problem["room"], BAD)
        yield f"  {room}, since {problem['since']}: {problem['text']}"
        yield f"    Next: {problem['next_step']}"


def _coloured(key: str, value: Any, now: datetime) -> str:
    text = _words(key, value)
    if key == "ready":
        return typer.style(text, GOOD if value else BAD)
    if key == "engine" and value:
        return typer.style(text, GOOD if value["state"] == "serving" else BAD)
    if key in ("not_ready", "quarantine") and value:
        return typer.style(text, BAD)
    if key == "lost" and value:
        return typer.style(text, DOUBTFUL)
    if key == "last_sync" and value:
        age_s = max(0.0, (now - datetime.fromisoformat(value)).total_seconds())
        return typer.style(f"{age_s:.0f} s ago ({text})", DOUBTFUL if age_s > 60 else GOOD)
    return text


def _words(key: str, value: Any) -> str:
    if value is None:
        return "none runs" if key == "round" else "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "aliases":
        return ", ".join(f"{alias} -> {version or 'nothing yet'}" for alias, version in
                         value.items()) or "-"  # fmt: skip
    if isinstance(value, Mapping):
        return _named(value) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in values.items()
        if value not in (None, "")
    )
