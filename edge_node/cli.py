"""`edge-node`: enroll | serve | status | doctor | outbox.

In: arguments and EDGE_* variables. Out: text or JSON, and one clear line with an exit code for every error. Heavy
imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import sys
from typing import TYPE_CHECKING, Any

from edge_node import __version__
from edge_node.errors import IN_TROUBLE, EdgeError, StorageError
from edge_node.logs import log_to_stderr
from edge_node.settings import EdgeSettings, load_settings

if TYPE_CHECKING:
    from edge_node.outbox import Outbox


def main(arguments: list[str] | None = None) -> None:
    """Entry point; ends the process."""
    options = _parser().parse_args(arguments)
    log_to_stderr()
    try:
        sys.exit(options.run(load_settings(), options))
    except EdgeError as error:
        print(f"edge-node: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (OSError, sqlite3.Error) as error:
        print(
            f"edge-node: {type(error).__name__}: {error}. Check EDGE_DATA_DIR: its permissions, space and files.",
            file=sys.stderr,
        )
        sys.exit(StorageError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-node",
        description="A Lorikeet edge node: serves with vLLM, learns on site, sends only adapters. "
        "Settings are EDGE_* environment variables (edge_node/settings.py).",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    command("enroll", _enroll, "make this node's key and get its certificate with EDGE_CENTRAL__JOIN_TOKEN")
    command("serve", _serve, "serve, learn, upload and follow releases until stopped")
    status = command("status", _status, "what this node serves, holds, waits for, and what fails")
    status.epilog = f"Exit code: 0 ready, 1 not ready, {IN_TROUBLE} ready but a room fails (problems)."
    status.add_argument("--json", action="store_true", help="for machines")
    status.add_argument("--live", action="store_true", help="only whether the supervisor is alive (for probes)")
    doctor = command("doctor", _doctor, "check settings, base, certificate, central, disk and port; say what to do")
    doctor.add_argument("--json", action="store_true", help="for machines")
    outbox = command("outbox", _outbox_list, "updates on their way to central")
    actions = outbox.add_subparsers(metavar="ACTION")
    listing = actions.add_parser("list", help="every update with its state")
    listing.set_defaults(run=_outbox_list)
    for parser_with_json in (outbox, listing):
        parser_with_json.add_argument("--json", action="store_true", help="for machines")
    for name, text in (
        ("approve", "let a held update leave this node"),
        ("reject", "keep a held update here for good"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("update_id", help="id or unique prefix from `edge-node outbox list`")
        action.set_defaults(run=_outbox_decide, decision=name)
    return parser


def _enroll(settings: EdgeSettings, options: argparse.Namespace) -> int:
    from edge_node.main import enroll, own_data_dir

    with own_data_dir(settings.data_dir):
        identity = asyncio.run(enroll(settings))
    print(f"Enrolled as {identity.node_id} in cohort {identity.cohort}; base {identity.base[:12]}.")
    return 0


def _serve(settings: EdgeSettings, options: argparse.Namespace) -> int:
    from edge_node.main import serve

    asyncio.run(serve(settings))
    return 0


def _status(settings: EdgeSettings, options: argparse.Namespace) -> int:
    if options.live:
        from edge_node.heartbeat import check_alive

        print(f"The supervisor was alive {check_alive(settings.data_dir):.0f} s ago.")
        return 0
    from edge_node.doctor import node_status

    status = asyncio.run(node_status(settings))
    if options.json:
        print(json.dumps(status, indent=1))
    else:
        _print_status(status)
    if not status["ready"]:
        return 1
    return IN_TROUBLE if status["problems"] else 0


def _print_status(status: dict[str, Any]) -> None:
    for key, value in status.items():
        if key != "problems":
            print(f"{key.replace('_', ' '):22} {value}")
    print(f"{'problems':22} {len(status['problems']) or 'none'}")
    for problem in status["problems"]:
        print(f"  {problem['room']}, since {problem['since']}: {problem['text']}")
        print(f"    Next: {problem['next_step']}")


def _doctor(settings: EdgeSettings, options: argparse.Namespace) -> int:
    from edge_node.doctor import run_checks

    checks = asyncio.run(run_checks(settings))
    if options.json:
        print(json.dumps([vars(check) for check in checks], indent=1))
    else:
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL'} {check.name:12} {check.text}")
    return 0 if all(check.ok for check in checks) else 1


def _outbox_list(settings: EdgeSettings, options: argparse.Namespace) -> int:
    from dataclasses import asdict

    entries = [asdict(entry) for entry in _open_outbox(settings).list()]
    if options.json:
        print(json.dumps(entries, indent=1, default=str))
    else:
        for entry in entries:
            print(f"{entry['update_id'][:16]}  #{entry['sequence']:<4} {entry['state']:9} {entry['reason'] or ''}")
        if not entries:
            print("The outbox is empty.")
    return 0


def _outbox_decide(settings: EdgeSettings, options: argparse.Namespace) -> int:
    outbox = _open_outbox(settings)
    matches = [entry.update_id for entry in outbox.list() if entry.update_id.startswith(options.update_id)]
    if len(matches) != 1:
        raise EdgeError(
            f"{len(matches)} updates match {options.update_id!r}; expected exactly one. See `edge-node outbox list`."
        )
    try:
        (outbox.approve if options.decision == "approve" else outbox.reject)(matches[0])
    except (ValueError, LookupError) as error:
        raise EdgeError(str(error)) from error
    print(f"{matches[0]} {options.decision}{'d' if options.decision.endswith('e') else 'ed'}.")
    return 0


def _open_outbox(settings: EdgeSettings) -> Outbox:
    from edge_node.identity import Identity
    from edge_node.outbox import Outbox

    Identity.load(settings.data_dir)  # a mistyped EDGE_DATA_DIR must not look like an empty outbox
    return Outbox(settings.data_dir / "outbox", settings.outbox.approval)


if __name__ == "__main__":
    main()
