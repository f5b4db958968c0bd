"""`edge-node keys create | list | revoke`, of which `cli.py` is the program.

In: arguments and EDGE_* variables. Out: text or JSON. The running node reads the same file, so
nothing is asked of it.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from edge_node.access.keys import Scope, create_key, keys_file, read_keys, revoke_key
from edge_node.settings import load_settings
from lorikeet.program import Json

keys = typer.Typer()


@keys.callback(invoke_without_command=True)
def about(context: typer.Context, as_json: Json = False) -> None:
    """Make, show and end the access keys of this node's endpoint."""
    if context.invoked_subcommand is None:
        list_keys(as_json)


@keys.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Name of the application or person that gets it.")],
    scope: Annotated[
        list[Scope] | None,
        typer.Option(
            help="What it may do: infer (ask the model), feedback (judge answers), admin "
            "(metrics). Give it again for another one. Unset: infer and feedback.",
            show_default=False,
        ),
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(help="It may judge only answers to keys of this user. Unset: all answers."),
    ] = None,
    capture: Annotated[
        bool,
        typer.Option(
            help="Whether answers to it may be kept, so that the node can learn from them."
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Print a new access key; it is shown only once.

    The file keeps its hash. The running node lets it in within 2 s.
    """
    path = keys_file(load_settings())
    scopes = scope or [Scope.INFER, Scope.FEEDBACK]
    key = create_key(path, name, scopes, user, capture=capture)
    if as_json:
        document = {"name": name, "key": key, "scopes": scopes, "user": user, "capture": capture}
        document["file"] = str(path)
        print(json.dumps(document))
    else:
        print(key)
        print(f"Key {name} ({', '.join(scopes)}) is in {path}.", file=sys.stderr)


@keys.command("list")
def list_keys(as_json: Json = False) -> None:
    """Show every key, without its secret (the default)."""
    path = keys_file(load_settings())
    try:
        known = read_keys(path)
    except FileNotFoundError:
        known = ()
    if as_json:
        print(
            json.dumps([key.model_dump(mode="json", exclude={"sha256"}) for key in known], indent=1)
        )
        return
    for key in known:
        state = "valid" if key.revoked is None else f"revoked {key.revoked:%Y-%m-%d %H:%M}"
        user = f"user {key.user}" if key.user else ""
        kept = "" if key.capture else "  not captured"
        print(
            f"{key.name:24} {', '.join(key.scopes):24} {state:24} "
            f"created {key.created:%Y-%m-%d}  {user}{kept}".rstrip()
        )
    if not known:
        print(f"No keys in {path}. Make one with `edge-node keys create NAME`.")


@keys.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="Its name, as `keys list` shows it; not the key.")],
    as_json: Json = False,
) -> None:
    """End a key: within 2 s, the running node answers it 401."""
    key = revoke_key(keys_file(load_settings()), name)
    if as_json:
        print(json.dumps(key.model_dump(mode="json", exclude={"sha256"})))
    else:
        print(f"Key {name} is revoked. The running node lets it in for at most 2 s more.")
