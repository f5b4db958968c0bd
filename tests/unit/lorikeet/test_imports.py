"""lorikeet imports nothing of ours, and no installed package but typer."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import lorikeet


def test_only_the_standard_library_and_typer_are_imported() -> None:
    found: set[str] = set()
    for path in Path(lorikeet.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    assert found <= {"lorikeet", "click", "typer", *sys.stdlib_module_names}
