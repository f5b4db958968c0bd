"""`edge-node rounds list | show | run | cancel`, of which `cli.py` is the program.

In: arguments and EDGE_* variables. Out: text or JSON; a plot. What loads slowly is imported inside
the commands.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_node.settings import load_settings
from lorikeet.program import Json

rounds = typer.Typer()


class Method(StrEnum):
    """How a round learns."""

    sft = "sft"
    dpo = "dpo"
    scored = "scored"
    kto = "kto"
    grpo = "grpo"


@rounds.callback(invoke_without_command=True)
def about(context: typer.Context, as_json: Json = False) -> None:
    """Show this node's rounds of learning; start or end one."""
    if context.invoked_subcommand is None:
        list_rounds(as_json)


@rounds.command("list")
def list_rounds(as_json: Json = False) -> None:
    """Show every round and what came of it, newest first (the default)."""
    from dataclasses import asdict

    from edge_node import rounds as node_rounds

    settings = load_settings()
    lines = node_rounds.list_rounds(settings)
    if as_json:
        print(json.dumps([asdict(line) for line in lines], indent=1))
        return
    for line in lines:
        done = "?" if line.steps_done is None else line.steps_done
        print(
            f"{line.number:4} {line.round_id:20} {line.method:5} {line.release:14} "
            f"{line.state:15} {line.begun[:19]} {f'{done}/{line.steps}':>9}  {line.result[:60]}"
        )
    if not lines:
        print("This node has begun no round yet.")
    if (wish := node_rounds.open_wish(settings)) is not None:
        print(f"A round by {wish.method} was asked for at {wish.asked_at[:19]}.")


@rounds.command("show")
def show_round(
    name: Annotated[
        str,
        typer.Argument(
            metavar="ROUND",
            help="Its number or id, or the first characters of that, from `edge-node rounds list`.",
        ),
    ],
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw its steps into this new file (PNG); needs matplotlib."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a round's plan, progress, metrics, and what the local gate counted."""
    from edge_node import rounds as node_rounds

    settings = load_settings()
    shown = node_rounds.show_round(settings, name)
    if plot is not None:
        from edge_node.learning.plot import draw

        draw(settings, shown["round_id"], plot)
        shown["plot"] = str(plot)
    if as_json:
        print(json.dumps(shown, indent=1))
    else:
        _print_round(shown)


def _print_round(shown: dict[str, Any]) -> None:
    for key, value in shown.items():
        if value in (None, "", [], {}):
            continue
        if not isinstance(value, dict):
            print(f"{key:22} {value}")
            continue
        print(f"{key}:")
        for name, inner in value.items():
            print(f"  {name:20} {f'{inner:.5g}' if isinstance(inner, float) else inner}")


@rounds.command("run")
def run_round(
    method: Annotated[
        Method | None,
        typer.Option(help="How it learns; unset: from what this node has.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask for a round now, although too little is new for one.

    It needs something to learn from: a right answer (sft), a preference (dpo), a new scored group
    (scored), a liked and a disliked answer (kto), or a verifier (grpo). It still waits for a window
    of EDGE_LEARNING__SCHEDULE.
    """
    from edge_node import rounds as node_rounds

    asked = node_rounds.ask_for_round(load_settings(), None if method is None else method.value)
    if as_json:
        print(json.dumps(asked, indent=1))
    else:
        print(
            f"A round by {asked['method']} from {asked['release']} is asked for. It starts "
            f"{asked['starts']}."
        )


@rounds.command("cancel")
def cancel_round(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[ROUND]", help="As of `show`; the one that runs without."),
    ] = None,
    as_json: Json = False,
) -> None:
    """End the round that runs, without an update, or take back the wish for one.

    It never goes on. The learner stops at its next step. What it learnt from stays.
    """
    from edge_node import rounds as node_rounds

    ended = node_rounds.cancel_round(load_settings(), name)
    if as_json:
        print(json.dumps({"round_id": ended}, indent=1))
    elif ended is None:
        print("The round that was asked for will not start.")
    else:
        print(f"Round {ended} is cancelled.")
