"""Writes docs/reference/ from the code: settings, command lines, exit codes, refusals, own routes.

    python -m docs.generate           writes the pages
    python -m docs.generate --check   names the pages that are out of date, and exits with 1

In: the settings models, the command lines, the errors and the reasons of both programs, with their
docstrings. Out: Markdown, and openapi.json. Guarantees: the same code gives the same bytes.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
import typer
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

import central.cli
import central.errors
import edge_node.cli
import edge_node.errors
from central.settings import CentralSettings
from edge_node import vllm_arguments
from edge_node.capture.choosing import REASONS
from edge_node.experience import usable
from edge_node.serving.openapi import openapi
from edge_node.settings import EdgeSettings
from lorikeet.program import CANNOT_PRINT

FOLDER = Path(__file__).parent / "reference"
COMMAND = "python -m docs.generate"
HEAD = f"<!-- Made by `{COMMAND}`. Do not edit: change the docstrings. -->\n\n"
KINDS: dict[Any, str] = {
    bool: "`true` or `false`",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    SecretStr: "secret text",
    list: "JSON list",
    dict: "JSON object",
}
BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def main(arguments: list[str]) -> int:
    """Writes the pages, or compares them; returns the exit code."""
    stale = [path for path, text in pages() if not path.is_file() or path.read_text() != text]
    if arguments == ["--check"]:
        for path in stale:
            print(f"docs/reference/{path.name} is not what the code gives now.", file=sys.stderr)
        if stale:
            print(f"Next: {COMMAND}, and commit the result.", file=sys.stderr)
        return 1 if stale else 0
    for path, text in pages():
        path.write_text(text)
    return 0


def pages() -> Iterator[tuple[Path, str]]:
    """Every page with its text."""
    makers: dict[str, Callable[[], str]] = {
        "settings.md": settings_page,
        "cli.md": lambda: cli_page({"edge-node": edge_node.cli.app, "central": central.cli.app}),
        "exit-codes.md": exit_codes_page,
        "refusals.md": refusals_page,
        "api.md": lambda: api_page(openapi()),
    }
    yield FOLDER / "openapi.json", json.dumps(openapi(), indent=1) + "\n"
    for name, make in makers.items():
        yield FOLDER / name, HEAD + make().rstrip() + "\n"


def settings_page() -> str:
    """Every variable of both programs."""
    return (
        "# Settings\n\n"
        "Both programs read environment variables, once, at start. `__` separates a group from\n"
        "its setting. Lists and objects are JSON. An unknown variable with the prefix is\n"
        "refused.\n\n"
        "## Edge node\n\n"
        + settings_of(EdgeSettings, "EDGE_", "###")
        + "## Central\n\n"
        + settings_of(CentralSettings, "CENTRAL_", "###")
    )


def settings_of(model: type[BaseModel], prefix: str, heading: str) -> str:
    """Own settings of `model` as one table, then one section for each group in it."""
    rows, sections = [], ""
    for name, field in model.model_fields.items():
        group = _model_in(field.annotation)
        if group is None or get_origin(field.annotation) is list:
            rows.append((f"`{prefix}{name.upper()}`", kind(field), _default(field), _text(field)))
        if group is not None:
            keys = get_origin(field.annotation) is list
            sections += f"{heading} {prefix}{name.upper()}{': keys of an item' if keys else ''}\n\n"
            inner = "" if keys else f"{prefix}{name.upper()}__"
            sections += settings_of(group, inner, heading + "#")
    if not prefix:  # keys of an item of a list are written as they are
        rows = [(row[0].lower(), *row[1:]) for row in rows]
    return table(("variable" if prefix else "key", "kind", "default", "meaning"), rows) + sections


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def kind(field: FieldInfo) -> str:
    """What a value must be, in words."""
    parts = [field.annotation]
    if get_origin(field.annotation) in (Union, UnionType):
        parts = [part for part in get_args(field.annotation) if part is not type(None)]
    words = []
    for part in parts:
        if get_origin(part) is Literal:
            words.append(", ".join(f"`{choice}`" for choice in get_args(part)))
        else:
            words.append(KINDS[get_origin(part) or part])
    bounds = [
        f"{text} {getattr(limit, name):g}"
        for name, text in BOUNDS.items()
        for limit in field.metadata
        if hasattr(limit, name)
    ]
    return ", ".join([*words, *bounds])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    if isinstance(value, bool | list | dict):
        return f"`{json.dumps(value)}`"
    return f"`{value}`" if value != "" else "empty"


def _text(field: FieldInfo) -> str:
    if not field.description:
        raise ValueError(
            f"{field!r} has no docstring; expected one, for docs/reference/settings.md"
        )
    return field.description


def cli_page(apps: dict[str, typer.Typer]) -> str:
    """Every command of `apps`, by the name of its program."""
    page = "# Command lines\n\nEvery command has `--help`. [Exit codes](exit-codes.md).\n\n"
    for program, app in apps.items():
        for path, command in _commands(program, typer.main.get_command(app)):
            page += f"{'##' if path == program else '###'} {path}\n\n" + _command(path, command)
    return page


def _commands(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from _commands(f"{path} {name}", inner)


def _command(path: str, command: click.Command) -> str:
    context = click.Context(command, info_name=path)
    usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
    text = inspect.cleandoc(command.help or "").replace("\f", "")
    rows = []
    for parameter in command.get_params(context):
        if "--help" in parameter.opts or getattr(parameter, "hidden", False):
            continue
        record = parameter.get_help_record(context) or (parameter.make_metavar(context), "")
        rows.append((f"`{record[0].strip()}`", record[1]))
    epilog = inspect.cleandoc(command.epilog or "")
    parts = [text, f"    {usage}", table(("argument or option", "meaning"), rows).rstrip(), epilog]
    return "\n\n".join(part for part in parts if part) + "\n\n"


def exit_codes_page() -> str:
    """Exit codes of both programs, from their errors."""
    page = (
        "# Exit codes\n\n"
        "Every error is one line on stderr: what was seen, what was expected, what to do next.\n"
        "Codes that both programs share:\n\n"
    )
    page += table(
        ("code", "meaning"),
        [
            ("0", "done"),
            (
                "1",
                "central refused; the node is not ready (status); a check fails (doctor)",
            ),
            ("2", "also: the command line is not usable"),
            (str(CANNOT_PRINT), "also: standard output cannot be written"),
            ("130", "interrupted (Ctrl-C)"),
        ],
    )
    for program, module, base in (
        ("edge-node", edge_node.errors, edge_node.errors.EdgeError),
        ("central", central.errors, central.errors.CentralError),
    ):
        rows = [(str(code), text) for code, text in sorted(_codes(module, base))]
        page += f"## {program}\n\n" + table(("code", "meaning"), rows)
    return page


def _codes(module: ModuleType, base: type[Exception]) -> Iterator[tuple[int, str]]:
    for item in vars(module).values():
        is_one = isinstance(item, type) and issubclass(item, base) and item is not base
        if is_one and "exit_code" in vars(item):
            yield item.exit_code, inspect.getdoc(item) or ""
    for name, text in attribute_docs(module).items():
        if isinstance(code := getattr(module, name), int):
            yield code, text


def refusals_page() -> str:
    """Why central and a node refuse, from their enums and tables."""
    reasons = attribute_docs(central.errors.Reason)
    feedback = [(getattr(usable, name), text) for name, text in attribute_docs(usable).items()]
    unkept = [(text, "Nothing: it is not stored (docs/privacy.md).") for text in REASONS.values()]
    arguments: dict[str, list[str]] = {}
    for name, text in vllm_arguments.REFUSED.items():
        arguments.setdefault(text, []).append(f"`{name}`")
    return (
        "# Refusals\n\n"
        "A refusal changes nothing. Its message says what was seen, what was expected, and\n"
        "what to do next.\n\n"
        "## Central\n\n"
        "A call that central refuses ends with a gRPC status and one of these codes in the\n"
        f"trailing metadata `{central.errors.REASON_KEY}`. `edge-node outbox list` shows the code\n"
        "of an update.\n\n"
        + table(("code", "meaning"), [(f"`{name}`", text) for name, text in reasons.items()])
        + "## Feedback that cannot be learnt from\n\n"
        "A node keeps all feedback on answers that it kept. The reply says `usable: false` and\n"
        "the reason. Feedback on an answer that was not kept, or was removed, is not stored.\n\n"
        + table(("reason", "what to do"), [*feedback, *unkept])
        + "## vLLM arguments that a node refuses\n\n"
        "In `EDGE_SERVING__EXTRA_ARGS`. What the node sets itself, or cannot work with:\n\n"
        + table(
            ("argument", "why, or what to do instead"),
            [(", ".join(names), text) for text, names in arguments.items()],
        )
    )


def api_page(document: dict[str, Any]) -> str:
    """The node's own routes, of its OpenAPI document."""
    page = (
        "# The node's own routes\n\n"
        "Feedback, probes and models. What answers requests is OpenAI's. The same as OpenAPI:\n"
        "[openapi.json](openapi.json), and `GET /v1/openapi.json` of a node.\n\n"
    )
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method == "parameters":
                continue
            page += f"## {method.upper()} {path}\n\n{operation['summary']}\n\n"
            page += "".join(
                f"Header `{header['name']}`: {header['description']}\n\n"
                for header in operation.get("parameters", ())
            )
            rows = [
                (f"`{status}`", _schema_of(answer), answer["description"])
                for status, answer in operation["responses"].items()
            ]
            page += table(("status", "body", "when"), rows)
    page += "## Bodies\n\nA body of `POST /v1/feedback` is one of the first five.\n\n"
    for name, schema in document["components"]["schemas"].items():
        if "properties" in schema:
            page += f"### {name}\n\n{schema.get('description', '')}\n\n".replace("\n\n\n\n", "\n\n")
            fields = [
                (
                    f"`{field}`",
                    "required" if field in schema.get("required", ()) else "",
                    json.dumps(
                        {key: value for key, value in about.items() if key != "description"}
                    ),
                    about.get("description", ""),
                )
                for field, about in schema["properties"].items()
            ]
            page += table(("field", "", "schema", "meaning"), fields)
    return page


def _schema_of(answer: dict[str, Any]) -> str:
    content = answer.get("content", {}).get("application/json")
    return f"`{content['schema']['$ref'].rpartition('/')[2]}`" if content else ""


def attribute_docs(owner: ModuleType | type) -> dict[str, str]:
    """Docstrings under the assignments of a module or class, by name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    body = tree.body
    if isinstance(owner, type) and isinstance(body[0], ast.ClassDef):
        body = body[0].body
    return {
        target.id: inspect.cleandoc(text.value.value)
        for statement, text in pairwise(body)
        if isinstance(statement, ast.Assign)
        and isinstance(target := statement.targets[0], ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; nothing without rows."""
    lines = [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    head = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*head, *lines]) + "\n\n" if lines else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
