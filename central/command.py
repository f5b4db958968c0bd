"""What the commands share: how they are declared, how they ask the running central, how they print.

In: parsers, work to do, messages. Out: text for people, or JSON. Heavy imports happen inside, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from central.settings import CentralSettings

if TYPE_CHECKING:
    from central.operator.client import OperatorClient

Options = argparse.Namespace


def command(commands: Any, name: str, run: Callable[[CentralSettings, Options], None], text: str) -> Any:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def json_option(parser: argparse.ArgumentParser, nested: bool = False) -> None:
    # Below a command that has --json too, the default is that command's, or `nodes --json list` would print a table.
    default = argparse.SUPPRESS if nested else False
    parser.add_argument("--json", action="store_true", default=default, help="for machines")


def asking(work: Callable[[OperatorClient, Options], None]) -> Callable[[CentralSettings, Options], None]:
    def run(settings: CentralSettings, options: Options) -> None:
        from central.operator.client import OperatorClient

        with OperatorClient.connect(settings) as client:
            work(client, options)

    return run


def rows_of(messages: Sequence[Any]) -> list[dict[str, Any]]:
    from central.operator.client import plain

    return [plain(message) for message in messages]


def print_rows(options: Options, rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    table = [list(columns), *([printable(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_standstills(options: Options, standstills: Sequence[Any]) -> None:
    """Say first what does not go on; beside JSON on stderr."""
    for row in rows_of(standstills):
        what = f"Cohort {row['cohort']} stands still" if row["cohort"] else "Central takes no uploads"
        print(printable(f"{what}: {row['reason']}"), file=sys.stderr if options.json else sys.stdout)


def print_one(options: Options, message: Any) -> None:
    (row,) = rows_of([message])
    if options.json:
        print(json.dumps(row, indent=2))
        return
    for key, value in row.items():
        print(f"{key}: {json.dumps(value) if isinstance(value, Mapping | list) else printable(value)}")


def print_text(options: Options, message: Any, lines: Callable[[Any], Iterable[str]]) -> None:
    if options.json:
        print_one(options, message)
        return
    for line in lines(message):
        print(printable(line))


def printable(value: object) -> str:
    """Text may come from a node: it must neither break a table nor steer the operator's terminal."""
    return "".join(character if character.isprintable() else " " for character in str(value))
