"""How the commands print: tables, one record, or lines for people; JSON for machines.

In: messages and rows. Out: text on stdout. Guarantees: no control character of a node's text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from central.printable import printable


def rows_of(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages as JSON values."""
    from central.operators.client import plain

    return [plain(message) for message in messages]


def print_rows(rows: list[dict[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """A table of the columns, or every field as JSON."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = [list(columns), *([printable(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def print_standstills(standstills: Sequence[Any], as_json: bool) -> None:
    """Say first what stands still; beside JSON on stderr."""
    for row in rows_of(standstills):
        cohort = row["cohort"]
        what = f"Cohort {cohort} stands still" if cohort else "Central takes no uploads"
        stream = sys.stderr if as_json else sys.stdout
        print(printable(f"{what}: {row['reason']}"), file=stream)


def print_merging(merges: Sequence[Any], as_json: bool) -> None:
    """Say how far merges have come; beside JSON on stderr."""
    for row in rows_of(merges):
        line = printable(f"Cohort {row['cohort']} is merging: {row['progress']}")
        print(line, file=sys.stderr if as_json else sys.stdout)


def print_one(message: Any, as_json: bool) -> None:
    """One record, a field a line."""
    (row,) = rows_of([message])
    if as_json:
        print(json.dumps(row, indent=2))
        return
    for key, value in row.items():
        nested = isinstance(value, Mapping | list)
        print(f"{key}: {json.dumps(value) if nested else printable(value)}")


def print_text(message: Any, lines: Callable[[Any], Iterable[str]], as_json: bool) -> None:
    """One record as `lines` words it."""
    if as_json:
        print_one(message, as_json)
        return
    for line in lines(message):
        print(printable(line))
