"""The programs accept every `central ...` and `edge-node ...` line in README.md and docs/."""

from __future__ import annotations

import re
import shlex

import click
import pytest
import typer

import central.cli
import edge_node.cli
from tests.unit.deploy.charts import ROOT

APPS = {"central": central.cli.app, "edge-node": edge_node.cli.app}


def commands() -> list[str]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    starts = (re.search(r"(?:^|-- )((?:central|edge-node) [a-z][^#\")]*)", line) for line in lines)
    return sorted({match[1].strip() for match in starts if match})


def test_there_are_commands_to_check() -> None:
    assert {"central serve", "edge-node serve", "edge-node doctor"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_the_parser_accepts_it(command: str) -> None:
    program, *arguments = shlex.split(command)
    parser = typer.main.get_command(APPS[program])
    _disarm(parser)
    parser(arguments, standalone_mode=False)


def _disarm(command: click.Command) -> None:
    """The command, and those below it, only read their arguments."""
    command.callback = None
    if isinstance(command, click.Group):
        for below in command.commands.values():
            _disarm(below)
