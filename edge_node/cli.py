"""`edge-node`: enroll | serve | status | doctor | keys | outbox | rounds | anchors | experience |
environments.

In: arguments and EDGE_* variables. Out: text or JSON, and one clear line with an exit code for
every error. What loads slowly is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from edge_node import __version__
from edge_node.anchors_cli import anchors
from edge_node.errors import IN_TROUBLE, EdgeError, StorageError
from edge_node.experience_cli import experience
from edge_node.keys_cli import keys
from edge_node.rounds_cli import rounds
from edge_node.settings import load_settings
from lorikeet.logs import log_to_stderr
from lorikeet.program import Json, complain, new_program, run

if TYPE_CHECKING:
    from edge_node.environments.checking import Findings
    from edge_node.environments.checking_levels import Level
    from edge_node.outbox import Outbox

Update = Annotated[
    str, typer.Argument(help="Its id, or the first digits of it, from `edge-node outbox list`.")
]

app = new_program(
    "A Lorikeet edge node: serves with vLLM, learns on site, sends only adapters. "
    "Settings are EDGE_* environment variables (edge_node/settings.py).",
    __version__,
)
outbox = typer.Typer()
app.add_typer(outbox, name="outbox")
app.add_typer(rounds, name="rounds")
app.add_typer(anchors, name="anchors")
app.add_typer(experience, name="experience")
app.add_typer(keys, name="keys")
environments = typer.Typer()
app.add_typer(environments, name="environments")


def main(arguments: list[str] | None = None) -> None:
    """Entry point; ends the process."""
    log_to_stderr()
    try:
        sys.exit(run(app, "edge-node", "cpu", arguments))
    except EdgeError as error:
        complain(f"edge-node: {error}")
        sys.exit(error.exit_code)
    except (OSError, sqlite3.Error) as error:
        complain(
            f"edge-node: {type(error).__name__}: {error}. Check EDGE_DATA_DIR: its permissions, "
            "space and files."
        )
        sys.exit(StorageError.exit_code)


@app.command("enroll")
def enroll() -> None:
    """Make this node's key and get its certificate.

    Central gives it for the token in EDGE_CENTRAL__JOIN_TOKEN.
    """
    from edge_node.main import enroll, own_data_dir

    settings = load_settings()
    with own_data_dir(settings.data_dir):
        identity = asyncio.run(enroll(settings))
    print(f"Enrolled as {identity.node_id} in cohort {identity.cohort}; base {identity.base[:12]}.")


@app.command("serve")
def serve() -> None:
    """Serve and learn until stopped.

    The node also uploads what it learnt, and follows central's releases.
    """
    from edge_node.main import serve
    from edge_node.tracing import start_traces

    settings = load_settings()
    log_to_stderr(settings.logs.format)
    start_traces(settings, "node")
    asyncio.run(serve(settings))


@app.command(
    "status",
    epilog=f"Exit code: 0 ready, 1 not ready, {IN_TROUBLE} ready but a room fails (problems).",
)
def status(
    live: Annotated[
        bool,
        typer.Option("--live", help="Only say whether the supervisor is alive (for probes)."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show engine, releases, keys, queues, rounds and the last sync, and what fails."""
    settings = load_settings()
    if live:
        from edge_node.heartbeat import check_alive

        print(f"The supervisor was alive {check_alive(settings.data_dir):.0f} s ago.")
        return
    from edge_node.doctor import node_status
    from edge_node.status import print_status

    status = asyncio.run(node_status(settings))
    if as_json:
        print(json.dumps(status, indent=1))
    else:
        print_status(status)
    if not status["ready"]:
        raise typer.Exit(1)
    raise typer.Exit(IN_TROUBLE if status["problems"] else 0)


@app.command("doctor")
def doctor(as_json: Json = False) -> None:
    """Check what the node needs, and say what to do.

    It checks settings, base, certificate, central, disk, port and access, and estimates a round.
    """
    from edge_node.doctor import run_checks

    checks = asyncio.run(run_checks(load_settings()))
    if as_json:
        print(json.dumps([vars(check) for check in checks], indent=1))
    else:
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL'} {check.name:12} {check.text}")
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)


@outbox.callback(invoke_without_command=True)
def updates(context: typer.Context, as_json: Json = False) -> None:
    """Show updates on their way to central; decide on one."""
    if context.invoked_subcommand is None:
        list_updates(as_json)


@outbox.command("list")
def list_updates(as_json: Json = False) -> None:
    """Show every update with its state (the default)."""
    from dataclasses import asdict

    entries = [asdict(entry) for entry in _open_outbox().list()]
    if as_json:
        print(json.dumps(entries, indent=1, default=str))
        return
    for entry in entries:
        print(
            f"{entry['update_id'][:16]}  #{entry['sequence']:<4} {entry['state']:9} "
            f"{entry['reason'] or ''}"
        )
    if not entries:
        print("The outbox is empty.")


@outbox.command("approve")
def approve(update_id: Update) -> None:
    """Let a held update leave this node."""
    outbox = _open_outbox()
    _decide(outbox, outbox.approve, update_id, "approved")


@outbox.command("reject")
def reject(update_id: Update) -> None:
    """Keep a held update here for good."""
    outbox = _open_outbox()
    _decide(outbox, outbox.reject, update_id, "rejected")


def _decide(outbox: Outbox, decision: Callable[[str], None], start: str, word: str) -> None:
    matches = [entry.update_id for entry in outbox.list() if entry.update_id.startswith(start)]
    if len(matches) != 1:
        raise EdgeError(
            f"{len(matches)} updates match {start!r}; expected exactly one. See "
            "`edge-node outbox list`."
        )
    try:
        decision(matches[0])
    except (ValueError, LookupError) as error:
        raise EdgeError(str(error)) from error
    print(f"{matches[0]} {word}.")


@environments.callback(invoke_without_command=True)
def plug_ins(context: typer.Context, as_json: Json = False) -> None:
    """Show the environments of EDGE_ENVIRONMENTS; check that they keep their contract."""
    if context.invoked_subcommand is None:
        list_environments(as_json)


@environments.command("list", epilog="Exit code: 0 all are ready, 1 not.")
def list_environments(as_json: Json = False) -> None:
    """Load each in its own process, and show its state (the default)."""
    from dataclasses import asdict

    from edge_node.environments.checking import list_environment

    listed = [list_environment(spec) for spec in load_settings().environments]
    if as_json:
        print(json.dumps([asdict(one) for one in listed], indent=1))
    else:
        for one in listed:
            anchor = "anchor" if one.anchor else ""
            print(f"{one.name:20} {one.kind or '?':6} {anchor:7} {one.factory}  {one.state}")
        print(
            "Each runs in its own process. Its network is open: this node does not limit it."
            if listed
            else "EDGE_ENVIRONMENTS names none."
        )
    raise typer.Exit(0 if all(one.state == "ready" for one in listed) else 1)


@environments.command("check", epilog="Exit code: 0 nothing is wrong, 1 something is.")
def check_environments(
    name: Annotated[
        str | None, typer.Argument(help="Its name in EDGE_ENVIRONMENTS; all of them without.")
    ] = None,
    tasks: Annotated[
        int, typer.Option(min=2, help="How many tasks or documents of each split are tried.")
    ] = 100,
    as_json: Json = False,
) -> None:
    """Try whether each environment keeps its contract, without a model.

    What an environment prints is shown on stderr.
    """
    from dataclasses import asdict

    from edge_node.environments.checking import check_environment

    specs = load_settings().environments
    chosen = [spec for spec in specs if name in (None, spec.name)]
    if not chosen:
        known = ", ".join(spec.name for spec in specs) or "none"
        raise EdgeError(
            f"No environment to check{f' is named {name!r}' if name else ''}. "
            f"EDGE_ENVIRONMENTS names: {known}."
        )
    checked = [check_environment(spec, tasks) for spec in chosen]
    if as_json:
        print(json.dumps([asdict(found) for found in checked], indent=1))
    else:
        for found in checked:
            _print_findings(found)
    raise typer.Exit(1 if any(found.wrong for found in checked) else 0)


def _print_findings(found: Findings) -> None:
    print(f"{'FAIL' if found.wrong else 'ok  '} {found.name}")
    for split, number in found.distinct.items():
        print(f"  distinct {split} {found.noun}: {number}")
    if found.distinct:
        print(f"  texts in both splits: {found.shared}")
    if found.scores is not None:
        low, high = found.scores
        of = (
            f"tools: {', '.join(found.tools)}; scores without a call"
            if found.tools
            else f"reference answers: {found.reference_answers}; scores seen"
        )
        print(f"  {of}: {low:g} to {high:g}")
    if found.weights is not None:
        print(f"  weights of train tasks: {found.weights[0]:g} to {found.weights[1]:g}")
    for level in found.levels:
        print(f"  {_level_line(level)}")
    if found.tasks_ms is not None:
        what = "an episode" if found.tools else "verify"
        verify = "" if found.verify_ms is None else f", {what} {found.verify_ms:.2f} ms a call"
        print(f"  {found.noun}: {found.tasks_ms:.1f} ms a call{verify}")
    for wrong in found.wrong:
        print(f"  Wrong: {wrong.what}")
        print(f"    Next: {wrong.next_step}")


def _level_line(level: Level) -> str:
    name = "none" if level.difficulty is None else level.difficulty
    means = [
        f"{mean:.3g} {of}"
        for mean, of in (
            (level.reference, "for reference answers"),
            (level.useless, "for nothing of use"),
        )
        if mean is not None
    ]
    return f"difficulty {name}: {level.tasks} tasks; mean reward {', '.join(means)}"


def _open_outbox() -> Outbox:
    from edge_node.identity import Identity
    from edge_node.outbox import Outbox

    settings = load_settings()
    Identity.load(settings.data_dir)  # a mistyped EDGE_DATA_DIR must not look like an empty outbox
    return Outbox(settings.data_dir / "outbox", settings.outbox.approval)


if __name__ == "__main__":
    main()
