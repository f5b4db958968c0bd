"""lorikeet imports nothing of ours, and no installed package but typer.

OpenTelemetry is imported by traces.py, where traces are on.
"""

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
    assert found <= {"lorikeet", "click", "typer", "opentelemetry", *sys.stdlib_module_names}


def test_opentelemetry_is_imported_where_traces_are_on_alone() -> None:
    tree = ast.parse((Path(lorikeet.__file__).parent / "traces.py").read_bytes())
    names = {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not [name for name in names if name.startswith("opentelemetry")]
    for path in Path(lorikeet.__file__).parent.glob("*.py"):
        assert path.name == "traces.py" or b"opentelemetry" not in path.read_bytes()
