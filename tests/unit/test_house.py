"""The house as a whole: names, sizes, and which room imports which."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("edge_node", "central", "protos", "lorikeet")


def modules() -> dict[str, Path]:
    """Dotted name -> file, of everything that is installed."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
MAX_LINES = 400


def test_no_room_or_module_has_the_name_of_a_standard_library_module() -> None:
    """Such a name misleads the reader; and a process that starts in the room finds ours first."""
    assert len(MODULES) > 100
    taken = {name for name in MODULES if name.rpartition(".")[2] in sys.stdlib_module_names}
    assert not taken


def test_no_file_is_longer_than_a_reader_holds_in_mind() -> None:
    folders = (*PACKAGES, "examples", "benchmarks", "tests", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in files
        if not path.stem.endswith(("_pb2", "_pb2_grpc"))
    }
    assert len(lines) > 300
    assert not {file: count for file, count in lines.items() if count > MAX_LINES}


def imported(name: str, path: Path) -> Iterator[str]:
    """Modules of ours that importing this one imports; those inside functions come later."""
    is_room = path.name == "__init__.py"
    for node in at_import(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            candidates = [item.name for item in node.names]
        else:
            above = name.split(".")[: len(name.split(".")) - node.level + is_room]
            start = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            below = [f"{start}.{item.name}" for item in node.names]
            candidates = [module if module in MODULES else start for module in below]
        yield from (other for other in candidates if other in MODULES and other != name)


def at_import(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from at_import(node)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or none."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: set(imported(name, path)) for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 300
    assert not circle(graph), " -> ".join(circle(graph))


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_only_a_worker_imports_the_loader_of_plug_ins() -> None:
    """An environment that hangs or crashes must not take vLLM, supervisor or learner with it."""
    loader = "edge_node.environments.loader"
    users = {name for name, path in MODULES.items() if loader in path.read_text()}
    assert users == {"edge_node.environments.worker"}
