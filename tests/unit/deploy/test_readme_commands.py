"""Every `central ...` and `edge-node ...` line in the READMEs is one that the programs accept."""

from __future__ import annotations

import re
import shlex

import pytest

import central.cli
import edge_node.cli
from tests.unit.deploy.charts import ROOT

PARSER = {"central": central.cli._parser(), "edge-node": edge_node.cli._parser()}


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text() + (ROOT / "deploy" / "README.md").read_text()
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    starts = (re.search(r"(?:^|-- )((?:central|edge-node) [a-z][^#\")]*)", line) for line in lines)
    return sorted({match[1].strip() for match in starts if match})


def test_there_are_commands_to_check() -> None:
    assert {"central serve", "edge-node serve", "edge-node doctor"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_the_parser_accepts_it(command: str) -> None:
    program, *arguments = shlex.split(command)
    PARSER[program].parse_args(arguments)
