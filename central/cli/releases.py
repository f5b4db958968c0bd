"""`central releases list | show | explain | diff | promote | rollback`: candidates and releases.

In: arguments. Out: text or JSON, after the running central has answered. `verify` and
`export` stand in files of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from central.cli.export import export
from central.cli.options import Channel, OneCohort, running_central
from central.cli.output import (
    print_merging,
    print_one,
    print_rows,
    print_standstills,
    print_text,
    rows_of,
)
from central.cli.verify import verify
from central.printable import printable
from lorikeet.program import Json

if TYPE_CHECKING:
    from protos.operators.v1 import operators_pb2

COLUMNS = (
    *("version", "cohort", "state", "channels", "updates", "created_at"),
    *("average", "forgetting", "verdict"),
)
RELEASE_HELP = "Its id, the first 6 or more digits of it, or its version (v3-7f3a9c01)."
Release = Annotated[str, typer.Argument(help=RELEASE_HELP)]

app = typer.Typer()


@app.callback(invoke_without_command=True)
def releases(context: typer.Context, as_json: Json = False) -> None:
    """Show candidates and releases; move channels."""
    if context.invoked_subcommand is None:
        list_releases(as_json=as_json)


@app.command("list")
def list_releases(cohort: OneCohort = "", as_json: Json = False) -> None:
    """Show every candidate and release (the default)."""
    with running_central() as client:
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.ListReleasesRequest(cohort=cohort)
        answer = client.ask(client.stub.ListReleases, request)
    print_standstills(answer.standstills, as_json)
    print_merging(answer.merging, as_json)
    _print_table(answer, as_json)


def _print_table(answer: operators_pb2.ListReleasesResponse, as_json: bool) -> None:
    rows = rows_of(answer.releases)
    columns = list(COLUMNS)
    if any(row["builds_on_id"] for row in rows):
        columns.insert(4, "builds_on")
    if not as_json:
        for row in rows:
            row["channels"] = ",".join(row["channels"])
            row["updates"] = len(row["update_weights"])
            row["builds_on"] = row["builds_on_id"][:8]
            for name in ("average", "forgetting"):
                figure = row["continual"][name]
                row[name] = "" if figure is None else f"{figure:.1f}"
    print_rows(rows, columns, as_json)
    if as_json:
        return
    from central.cli.release_texts import soak_line

    for release in answer.releases:
        if release.HasField("soak"):
            print(printable(soak_line(release)))


@app.command("show")
def show(release: Release, as_json: Json = False) -> None:
    """Show one release with its updates, evaluations and verdict.

    The last lines say what it and its ancestors gained and lost (docs/gate.md).
    """
    with running_central() as client:
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.GetReleaseRequest(release=release)
        found = client.ask(client.stub.GetRelease, request).release
    print_one(found, as_json)
    if not as_json:
        from central.cli.release_texts import continual_lines

        for line in continual_lines(found):
            print(printable(line))


@app.command("explain")
def explain(release: Release, as_json: Json = False) -> None:
    """Say where a release comes from, and where it serves.

    It says also why the gate accepted it or not.
    """
    with running_central() as client:
        from central.cli.release_texts import explanation
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.ExplainReleaseRequest(release=release)
        print_text(client.ask(client.stub.ExplainRelease, request), explanation, as_json)


@app.command("diff")
def diff(release_a: Release, release_b: Release, as_json: Json = False) -> None:
    """Show what the second release has that the first has not."""
    with running_central() as client:
        from central.cli.release_texts import difference
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.DiffReleasesRequest(release_a=release_a, release_b=release_b)
        print_text(client.ask(client.stub.DiffReleases, request), difference, as_json)


@app.command("promote")
def promote(
    release: Release,
    channel: Annotated[Channel, typer.Option(help="The channel to point at it.")],
    as_json: Json = False,
) -> None:
    """Point a channel at an accepted release."""
    with running_central() as client:
        from protos.operators.v1 import operators_pb2

        request = operators_pb2.PromoteReleaseRequest(release=release, channel=channel)
        promoted = client.ask(client.stub.PromoteRelease, request).release
    if as_json:
        print_one(promoted, as_json)
    else:
        print(f"{promoted.cohort}: {channel} is {promoted.version}.")


@app.command("rollback")
def rollback(
    cohort: Annotated[str, typer.Option(help="The cohort.")],
    updates: Annotated[
        Literal["requeue", "set-aside"],
        typer.Option(help="What happens to the updates of the abandoned releases."),
    ],
    channel: Annotated[
        Channel,
        typer.Option(
            help="The channel to return; stable takes a canary that is ahead of it back too."
        ),
    ] = "stable",
    to: Annotated[
        str,
        typer.Option(
            metavar="RELEASE", help="The release to return to, if not the parent of the head."
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Return a cohort's channel to an earlier release."""
    with running_central() as client:
        from central.cli.release_texts import freed
        from protos.operators.v1 import operators_pb2

        choice = {
            "requeue": operators_pb2.ABANDONED_UPDATES_REQUEUE,
            "set-aside": operators_pb2.ABANDONED_UPDATES_SET_ASIDE,
        }[updates]
        request = operators_pb2.RollbackReleaseRequest(
            cohort=cohort, release=to, updates=choice, channel=channel
        )
        answer = client.ask(client.stub.RollbackRelease, request)
    if not as_json:
        what = "canary ended, stable stays" if channel == "canary" else "stable is"
        abandoned = ", ".join(release_id[:8] for release_id in answer.abandoned_release_ids)
        print(
            f"{cohort}: {what} {answer.release.version}; abandoned {abandoned}; "
            f"updates freed: {len(answer.updates)}"
        )
    print_text(answer, freed, as_json)


app.command("verify")(verify)
app.command("export")(export)
