"""`central`: serve | nodes | tokens | releases | updates | events | journal.

In: arguments and CENTRAL_* variables. Out: text or JSON, and one clear line with an exit code for every error. All
commands but `serve`, `journal` and `releases verify` ask the running central as its operator. Heavy imports happen inside the commands, so that
`--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from central import __version__
from central.errors import CentralError
from central.settings import CentralSettings, load_settings

if TYPE_CHECKING:
    from central.operator.client import OperatorClient

Options = argparse.Namespace


def main(arguments: list[str] | None = None) -> None:
    """Entry point; ends the process."""
    options = _parser().parse_args(arguments)
    try:
        options.run(load_settings(), options)
        sys.exit(0)
    except CentralError as error:
        print(f"central: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except UnicodeEncodeError:
        print("central: An argument is not UTF-8 text. Expected text that this terminal can show.", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a listing went away
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="central",
        description="Lorikeet's central: admits updates, merges them with Flower, gates and releases. "
        "Settings are CENTRAL_* environment variables (central/settings.py).",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _command(commands, "serve", _serve, "serve nodes and operators, merge and release until stopped")
    nodes = _command(commands, "nodes", _asking(_nodes), "enrolled nodes and what they report")
    _json(nodes)
    node_actions = nodes.add_subparsers(metavar="ACTION")
    _json(_command(node_actions, "list", _asking(_nodes), "every node (the default)"), nested=True)
    revoke = _command(node_actions, "revoke", _asking(_revoke), "refuse a node from now on")
    revoke.add_argument("node_id")
    _add_tokens(commands)
    _add_releases(commands)
    updates = _command(commands, "updates", _asking(_updates), "admitted updates and where they stand")
    updates.add_argument("--cohort", default="", help="only this cohort")
    updates.add_argument("--node", default="", help="only this node id")
    _json(updates)
    events = _command(commands, "events", _asking(_events), "the journal")
    events.add_argument("--after", type=int, default=0, help="events after this number (default 0)")
    events.add_argument("--limit", type=int, default=1000, help="at most this many (default 1000)")
    _json(events)
    journal = commands.add_parser("journal", help="check the journal's hash chain", description="the journal on disk")
    journal_actions = journal.add_subparsers(required=True, metavar="ACTION")
    text = "re-read every event, check the hash chain and replay it; writes nothing, central may run or not"
    _json(_command(journal_actions, "verify", _verify, text))
    return parser


def _add_tokens(commands: Any) -> None:
    tokens = commands.add_parser("tokens", help="join tokens for new nodes", description="join tokens for new nodes")
    actions = tokens.add_subparsers(required=True, metavar="ACTION")
    create = _command(actions, "create", _asking(_create_token), "print a new join token; it is shown only once")
    create.add_argument("--cohort", default="shared", help="cohort of the nodes that join with it (default shared)")
    create.add_argument("--uses", type=int, default=1, help="how many nodes may join with it (default 1)")
    create.add_argument("--valid-hours", type=float, default=24.0, help="life in hours (default 24)")
    _json(create)


def _add_releases(commands: Any) -> None:
    releases = _command(commands, "releases", _asking(_releases), "candidates and releases")
    releases.set_defaults(cohort="")
    _json(releases)
    actions = releases.add_subparsers(metavar="ACTION")
    listing = _command(actions, "list", _asking(_releases), "every candidate and release (the default)")
    listing.add_argument("--cohort", default="", help="only this cohort")
    show = _command(actions, "show", _asking(_show), "one release with its updates, evaluations and verdict")
    explain = _command(
        actions, "explain", _asking(_explain), "where a release comes from, why it was accepted, where it serves"
    )
    diff = _command(actions, "diff", _asking(_diff), "what the second release has that the first has not")
    diff.add_argument("release_a", help="as for show")
    diff.add_argument("release_b")
    promote = _command(actions, "promote", _asking(_promote), "point a channel at an accepted release")
    promote.add_argument("--channel", required=True, choices=("stable", "canary"))
    for parser in (show, explain, promote):
        parser.add_argument("release", help="id, its first 6 or more digits, or version (v3-7f3a9c01)")
    rollback = _command(
        actions, "rollback", _asking(_rollback), "return a cohort's stable channel to an earlier release"
    )
    rollback.add_argument("--cohort", required=True)
    rollback.add_argument(
        "--to", default="", metavar="RELEASE", help="release to return to (default: the head's parent)"
    )
    rollback.add_argument(
        "--updates",
        required=True,
        choices=("requeue", "set-aside"),
        help="what happens to the abandoned releases' updates",
    )
    text = "rebuild releases from their updates and compare the bytes; reads the data directory, central may run or not"
    check = _command(actions, "verify", _verify_releases, text)
    check.add_argument("release", nargs="?", default="", help="one release (default: every release and candidate)")
    check.add_argument("--cohort", default="", help="only this cohort")
    check.add_argument("--deep", action="store_true", help="with a release: its whole line, from version 0 on")
    for parser in (listing, show, explain, diff, promote, rollback, check):
        _json(parser, nested=True)


def _command(commands: Any, name: str, run: Callable[[CentralSettings, Options], None], text: str) -> Any:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _json(parser: argparse.ArgumentParser, nested: bool = False) -> None:
    # Below a command that has --json too, the default is that command's, or `nodes --json list` would print a table.
    default = argparse.SUPPRESS if nested else False
    parser.add_argument("--json", action="store_true", default=default, help="for machines")


def _serve(settings: CentralSettings, options: Options) -> None:
    import asyncio

    from central.logs import log_to_stderr
    from central.main import serve

    log_to_stderr()
    asyncio.run(serve(settings, lambda line: print(line, flush=True)))


def _asking(work: Callable[[OperatorClient, Options], None]) -> Callable[[CentralSettings, Options], None]:
    def run(settings: CentralSettings, options: Options) -> None:
        from central.operator.client import OperatorClient

        with OperatorClient.connect(settings) as client:
            work(client, options)

    return run


def _nodes(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    answer = client.ask(client.stub.ListNodes, operator_pb2.ListNodesRequest())
    rows = _rows(answer.nodes)
    for row in rows:
        row["link"] = "revoked" if row["revoked"] else "connected" if row["connected"] else "away"
        row["serving"] = row["status"]["serving_release_id"][:8]
        row["problem"] = row["status"]["problem"]
    _print(options, rows, ("node_id", "cohort", "link", "last_seen", "serving", "problem"))


def _revoke(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    client.ask(client.stub.RevokeNode, operator_pb2.RevokeNodeRequest(node_id=options.node_id))
    print(f"Node {options.node_id} is revoked.")


def _create_token(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    valid_s = options.valid_hours * 3600
    if not (0 < options.uses < 2**32 and 0 < valid_s < 2**32):  # also false for nan
        raise CentralError(
            f"--uses {options.uses} with --valid-hours {options.valid_hours:g} is not possible. Expected both above 0, "
            f"below {2**32} uses and {2**32 // 3600} hours."
        )
    request = operator_pb2.CreateTokenRequest(cohort=options.cohort, uses=options.uses, valid_s=int(valid_s))
    answer = client.ask(client.stub.CreateToken, request)
    print(json.dumps({"token": answer.token}) if options.json else answer.token)


def _releases(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    answer = client.ask(client.stub.ListReleases, operator_pb2.ListReleasesRequest(cohort=options.cohort))
    rows = _rows(answer.releases)
    if not options.json:
        for row in rows:
            row["channels"] = ",".join(row["channels"])
            row["updates"] = len(row["update_weights"])
    _print(options, rows, ("version", "cohort", "state", "channels", "updates", "created_at", "verdict"))


def _show(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    answer = client.ask(client.stub.GetRelease, operator_pb2.GetReleaseRequest(release=options.release))
    _print_one(options, answer.release)


def _explain(client: OperatorClient, options: Options) -> None:
    from central.operator.texts import explanation
    from protos.operator.v1 import operator_pb2

    request = operator_pb2.ExplainReleaseRequest(release=options.release)
    _print_text(options, client.ask(client.stub.ExplainRelease, request), explanation)


def _diff(client: OperatorClient, options: Options) -> None:
    from central.operator.texts import difference
    from protos.operator.v1 import operator_pb2

    request = operator_pb2.DiffReleasesRequest(release_a=options.release_a, release_b=options.release_b)
    _print_text(options, client.ask(client.stub.DiffReleases, request), difference)


def _promote(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    request = operator_pb2.PromoteReleaseRequest(release=options.release, channel=options.channel)
    _print_one(options, client.ask(client.stub.PromoteRelease, request).release)


def _rollback(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    choice = {
        "requeue": operator_pb2.ABANDONED_UPDATES_REQUEUE,
        "set-aside": operator_pb2.ABANDONED_UPDATES_SET_ASIDE,
    }[options.updates]
    request = operator_pb2.RollbackReleaseRequest(cohort=options.cohort, release=options.to, updates=choice)
    answer = client.ask(client.stub.RollbackRelease, request)
    if options.json:
        _print_one(options, answer)
    else:
        print(
            f"{options.cohort}: stable is {answer.release.version}; abandoned {', '.join(answer.abandoned_release_ids)}"
        )


def _updates(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    request = operator_pb2.ListUpdatesRequest(cohort=options.cohort, node_id=options.node)
    rows = _rows(client.ask(client.stub.ListUpdates, request).updates)
    if not options.json:
        for row in rows:
            row["update_id"], row["release_id"] = row["update_id"][:12], row["release_id"][:8]
    _print(
        options,
        rows,
        ("update_id", "node_id", "cohort", "sequence", "state", "rank", "size_bytes", "release_id", "reason"),
    )


def _events(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    if not 0 <= options.after < 2**63 or not 0 < options.limit < 2**32:
        raise CentralError(
            f"--after {options.after} with --limit {options.limit} is not possible. Expected --after 0 to {2**63 - 1} and "
            "--limit at least 1."
        )
    request = operator_pb2.ListEventsRequest(after=options.after, limit=options.limit)
    rows = _rows(client.ask(client.stub.ListEvents, request).events)
    if options.json:
        for row in rows:
            row["body"] = json.loads(row["body"])
    _print(options, rows, ("sequence", "at", "cohort", "kind", "subject"))


def _verify(settings: CentralSettings, options: Options) -> None:
    from central.journal import verify_journal

    state = verify_journal(settings.journal_url)
    digest = state.last_hash if state.sequence else ""
    if options.json:
        print(json.dumps({"events": state.sequence, "hash": digest}))
    else:
        # A cut-off tail cannot be seen from the chain itself, only against what somebody else wrote down.
        print(f"The journal is whole: {state.sequence} events, the last one with hash {digest or 'none'}.")


def _verify_releases(settings: CentralSettings, options: Options) -> None:
    from central.lineage import verify_on_disk

    findings = verify_on_disk(settings, options.release, options.cohort, options.deep)
    rows = [dict(vars(finding)) for finding in findings]
    _print(options, rows, ("version", "cohort", "state", "updates", "outcome", "problem"))
    bad = [row["version"] for row in rows if row["outcome"] != "identical"]
    if bad:
        raise CentralError(
            f"{len(bad)} of {len(rows)} releases could not be rebuilt to the same bytes: {', '.join(bad)}. Expected all "
            "identical on the machine that merged them; run `central journal verify`, and restore missing blobs from a backup."
        )


def _rows(messages: Sequence[Any]) -> list[dict[str, Any]]:
    from central.operator.client import plain

    return [plain(message) for message in messages]


def _print(options: Options, rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    table = [list(columns), *([_printable(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_one(options: Options, message: Any) -> None:
    (row,) = _rows([message])
    if options.json:
        print(json.dumps(row, indent=2))
        return
    for key, value in row.items():
        print(f"{key}: {json.dumps(value) if isinstance(value, Mapping | list) else _printable(value)}")


def _print_text(options: Options, message: Any, lines: Callable[[Any], Iterable[str]]) -> None:
    if options.json:
        _print_one(options, message)
        return
    for line in lines(message):
        print(_printable(line))


def _printable(value: object) -> str:
    """Text may come from a node: it must neither break a table nor steer the operator's terminal."""
    return "".join(character if character.isprintable() else " " for character in str(value))


if __name__ == "__main__":
    main()
