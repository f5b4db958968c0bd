"""`central`: serve | nodes | tokens | releases | updates | forget | events | journal | retention | backup | restore.

In: arguments and CENTRAL_* variables. Out: text or JSON, and one clear line with an exit code for every error. All commands but `serve`,
`journal`, `releases verify`, `backup` and `restore` ask the running central as its operator. Heavy imports happen inside the commands,
so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from central import __version__
from central.command import (
    Options,
    asking,
    command,
    json_option,
    print_one,
    print_rows,
    print_standstills,
    print_text,
    printable,
    rows_of,
)
from central.errors import CentralError
from central.journal_commands import add_journal
from central.operator.commands import add_forget, add_nodes, add_updates
from central.operator.tokens import add_tokens
from central.settings import CentralSettings, load_settings
from central.storage.commands import add_backup, add_restore, add_retention

if TYPE_CHECKING:
    from central.operator.client import OperatorClient


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
    command(commands, "serve", _serve, "serve nodes and operators, merge and release until stopped")
    add_nodes(commands)
    add_tokens(commands)
    _add_releases(commands)
    add_updates(commands)
    add_forget(commands)
    add_retention(commands)
    add_backup(commands)
    add_restore(commands)
    events = command(commands, "events", asking(_events), "the journal")
    events.add_argument("--after", type=int, default=0, help="events after this number (default 0)")
    events.add_argument("--limit", type=int, default=1000, help="at most this many (default 1000)")
    json_option(events)
    add_journal(commands)
    return parser


def _add_releases(commands: Any) -> None:
    releases = command(commands, "releases", asking(_releases), "candidates and releases")
    releases.set_defaults(cohort="")
    json_option(releases)
    actions = releases.add_subparsers(metavar="ACTION")
    listing = command(actions, "list", asking(_releases), "every candidate and release (the default)")
    listing.add_argument("--cohort", default="", help="only this cohort")
    show = command(actions, "show", asking(_show), "one release with its updates, evaluations and verdict")
    explain = command(
        actions, "explain", asking(_explain), "where a release comes from, why it was accepted, where it serves"
    )
    diff = command(actions, "diff", asking(_diff), "what the second release has that the first has not")
    diff.add_argument("release_a", help="as for show")
    diff.add_argument("release_b")
    promote = command(actions, "promote", asking(_promote), "point a channel at an accepted release")
    promote.add_argument("--channel", required=True, choices=("stable", "canary"))
    for parser in (show, explain, promote):
        parser.add_argument("release", help="id, its first 6 or more digits, or version (v3-7f3a9c01)")
    rollback = command(actions, "rollback", asking(_rollback), "return a cohort's channel to an earlier release")
    rollback.add_argument("--cohort", required=True)
    text = "channel to return (default stable, which takes a canary ahead of it back too)"
    rollback.add_argument("--channel", default="stable", choices=("stable", "canary"), help=text)
    rollback.add_argument(
        "--to", default="", metavar="RELEASE", help="release to return to (default: the parent of its head)"
    )
    rollback.add_argument(
        "--updates",
        required=True,
        choices=("requeue", "set-aside"),
        help="what happens to the abandoned releases' updates",
    )
    text = "rebuild releases from their updates and compare the bytes; reads the data directory, central may run or not"
    check = command(actions, "verify", _verify_releases, text)
    check.add_argument("release", nargs="?", default="", help="one release (default: every release and candidate)")
    check.add_argument("--cohort", default="", help="only this cohort")
    check.add_argument("--deep", action="store_true", help="with a release: its whole line, from version 0 on")
    for parser in (listing, show, explain, diff, promote, rollback, check):
        json_option(parser, nested=True)


def _serve(settings: CentralSettings, options: Options) -> None:
    import asyncio

    from central.logs import log_to_stderr

    log_to_stderr()  # before gRPC is loaded
    from central.main import serve

    asyncio.run(serve(settings, lambda line: print(line, flush=True)))


def _releases(client: OperatorClient, options: Options) -> None:
    from central.operator.texts import soak_line
    from protos.operator.v1 import operator_pb2

    answer = client.ask(client.stub.ListReleases, operator_pb2.ListReleasesRequest(cohort=options.cohort))
    rows = rows_of(answer.releases)
    print_standstills(options, answer.standstills)
    if not options.json:
        for row in rows:
            row["channels"] = ",".join(row["channels"])
            row["updates"] = len(row["update_weights"])
            row["builds_on"] = row["builds_on_id"][:8]
    columns = ["version", "cohort", "state", "channels", "updates", "created_at", "verdict"]
    if any(row["builds_on_id"] for row in rows):
        columns.insert(4, "builds_on")
    print_rows(options, rows, columns)
    if not options.json:
        for release in answer.releases:
            if release.HasField("soak"):
                print(printable(soak_line(release)))


def _show(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    answer = client.ask(client.stub.GetRelease, operator_pb2.GetReleaseRequest(release=options.release))
    print_one(options, answer.release)


def _explain(client: OperatorClient, options: Options) -> None:
    from central.operator.texts import explanation
    from protos.operator.v1 import operator_pb2

    request = operator_pb2.ExplainReleaseRequest(release=options.release)
    print_text(options, client.ask(client.stub.ExplainRelease, request), explanation)


def _diff(client: OperatorClient, options: Options) -> None:
    from central.operator.texts import difference
    from protos.operator.v1 import operator_pb2

    request = operator_pb2.DiffReleasesRequest(release_a=options.release_a, release_b=options.release_b)
    print_text(options, client.ask(client.stub.DiffReleases, request), difference)


def _promote(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    request = operator_pb2.PromoteReleaseRequest(release=options.release, channel=options.channel)
    release = client.ask(client.stub.PromoteRelease, request).release
    if options.json:
        print_one(options, release)
    else:
        print(f"{release.cohort}: {options.channel} is {release.version}.")


def _rollback(client: OperatorClient, options: Options) -> None:
    from central.operator.texts import freed
    from protos.operator.v1 import operator_pb2

    choice = {
        "requeue": operator_pb2.ABANDONED_UPDATES_REQUEUE,
        "set-aside": operator_pb2.ABANDONED_UPDATES_SET_ASIDE,
    }[options.updates]
    request = operator_pb2.RollbackReleaseRequest(
        cohort=options.cohort, release=options.to, updates=choice, channel=options.channel
    )
    answer = client.ask(client.stub.RollbackRelease, request)
    if options.json:
        print_one(options, answer)
    else:
        what = "canary ended, stable stays" if options.channel == "canary" else "stable is"
        abandoned = ", ".join(release_id[:8] for release_id in answer.abandoned_release_ids)
        print(
            f"{options.cohort}: {what} {answer.release.version}; abandoned {abandoned}; updates freed: {len(answer.updates)}"
        )
        print_text(options, answer, freed)


def _events(client: OperatorClient, options: Options) -> None:
    from protos.operator.v1 import operator_pb2

    if not 0 <= options.after < 2**63 or not 0 < options.limit < 2**32:
        raise CentralError(
            f"--after {options.after} with --limit {options.limit} is not possible. Expected --after 0 to {2**63 - 1} and "
            "--limit at least 1."
        )
    request = operator_pb2.ListEventsRequest(after=options.after, limit=options.limit)
    rows = rows_of(client.ask(client.stub.ListEvents, request).events)
    if options.json:
        for row in rows:
            row["body"] = json.loads(row["body"])
    print_rows(options, rows, ("sequence", "at", "cohort", "kind", "subject"))


def _verify_releases(settings: CentralSettings, options: Options) -> None:
    from central.lineage import verify_on_disk

    findings = verify_on_disk(settings, options.release, options.cohort, options.deep)
    rows = [dict(vars(finding)) for finding in findings]
    print_rows(options, rows, ("version", "cohort", "state", "updates", "outcome", "problem"))
    fine = ("identical", "forgotten")
    bad = [row["version"] for row in rows if row["outcome"] not in fine and not _was_let_go(row)]
    if bad:
        raise CentralError(
            f"{len(bad)} of {len(rows)} releases are damaged or could not be rebuilt to the same "
            f"bytes: {', '.join(bad)}. Expected all identical on the machine that merged them; run "
            "`central journal verify`, and restore missing blobs from a backup."
        )


def _was_let_go(row: dict[str, Any]) -> bool:
    return row["outcome"] == "collected" and row["state"] in ("rejected", "abandoned", "withdrawn")


if __name__ == "__main__":
    main()
