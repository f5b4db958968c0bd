"""Lints our protos by buf's STANDARD rules; `python -m tests.lint_protos`, part of `make lint`.

In: protos/<domain>/v1/*.proto, compiled to descriptors by protoc. Out: one line per problem and
exit code 1, or nothing and 0. That the committed stubs fit the protos is checked beside this, by
`.ci/stub-drift`.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc_tools
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[1]

PASCAL = re.compile(r"^[A-Z][A-Za-z0-9]*$")
LOWER_SNAKE = re.compile(r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$")
UPPER_SNAKE = re.compile(r"^[A-Z][A-Z0-9]*(_[A-Z0-9]+)*$")
REQUIRED = re.compile(r"^Required( first message of the stream)?\.")
"""How a comment says that a field must be set."""


def compile_protos(root: Path) -> FileDescriptorSet:
    """Descriptors with comments of every proto under `root`/protos.

    Raises ValueError when protoc refuses one.
    """
    files = sorted(str(path.relative_to(root)) for path in root.glob("protos/*/v*/*.proto"))
    includes = [f"-I{root}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set.binpb"
        arguments = [
            "protoc",
            *includes,
            "--include_source_info",
            f"--descriptor_set_out={out}",
            *files,
        ]
        if not files or protoc.main(arguments) != 0:
            raise ValueError(
                f"protoc compiled nothing under {root}: {len(files)} protos, see its message above."
            )
        return FileDescriptorSet.FromString(out.read_bytes())


def find_problems(files: FileDescriptorSet) -> list[str]:
    """One line per broken rule, `file: what, expected what`."""
    return [f"{file.name}: {problem}" for file in files.file for problem in _file_problems(file)]


def _file_problems(file: FileDescriptorProto) -> Iterator[str]:
    match = re.fullmatch(
        r"protos/([a-z][a-z0-9_]*)/(v[1-9][0-9]*)/([a-z][a-z0-9_]*)\.proto", file.name
    )
    expected = f"lorikeet.{match[1]}.{match[2]}" if match else None
    if expected is None:
        yield "path; expected protos/<domain>/v<n>/<lower_snake>.proto"
    elif file.package != expected:
        yield f"package {file.package!r}; expected {expected!r} as its directory says"
    if file.syntax != "proto3":
        yield f"syntax {file.syntax or 'proto2'!r}; expected 'proto3'"
    for message in file.message_type:
        yield from _message_problems(message, message.name)
    for enum in file.enum_type:
        yield from _enum_problems(enum)
    for service in file.service:
        yield from _service_problems(service, file.package)
    yield from _shared_messages(file.service)
    yield from _comment_problems(file)


def _message_problems(message: DescriptorProto, where: str) -> Iterator[str]:
    if message.options.map_entry:
        return
    if not PASCAL.match(message.name):
        yield f"message {where}; expected PascalCase"
    # Of an optional field protoc makes a oneof of its own.
    optional = {field.name for field in message.field if field.proto3_optional}
    for name in [field.name for field in message.field] + [
        oneof.name for oneof in message.oneof_decl if oneof.name.removeprefix("_") not in optional
    ]:
        if not LOWER_SNAKE.match(name):
            yield f"field {where}.{name}; expected lower_snake_case"
    for enum in message.enum_type:
        yield from _enum_problems(enum)
    for nested in message.nested_type:
        yield from _message_problems(nested, f"{where}.{nested.name}")


def _enum_problems(enum: EnumDescriptorProto) -> Iterator[str]:
    if not PASCAL.match(enum.name):
        yield f"enum {enum.name}; expected PascalCase"
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
    for value in enum.value:
        if not UPPER_SNAKE.match(value.name) or not value.name.startswith(prefix):
            yield f"enum value {value.name}; expected {prefix}<UPPER_SNAKE>"
        if value.number == 0 and value.name != f"{prefix}UNSPECIFIED":
            yield f"enum value {value.name} is zero; expected {prefix}UNSPECIFIED"


def _service_problems(service: ServiceDescriptorProto, package: str) -> Iterator[str]:
    if not PASCAL.match(service.name) or not service.name.endswith("Service"):
        yield f"service {service.name}; expected PascalCase ending in Service"
    for method in service.method:
        if not PASCAL.match(method.name):
            yield f"rpc {service.name}.{method.name}; expected PascalCase"
        for kind, seen in (("Request", method.input_type), ("Response", method.output_type)):
            expected = f".{package}.{method.name}{kind}"
            if seen != expected:
                name = f"{service.name}.{method.name}"
                yield f"rpc {name} has {kind.lower()} {seen[1:]}; expected {expected[1:]}"


def _shared_messages(services: Iterable[ServiceDescriptorProto]) -> Iterator[str]:
    seen: dict[str, str] = {}
    for service in services:
        for method in service.method:
            for message in (method.input_type, method.output_type):
                if message in seen:
                    users = f"{seen[message]} and {method.name}"
                    yield f"{message[1:]} is used by {users}; expected one rpc per message"
                seen[message] = method.name


def _comment_problems(file: FileDescriptorProto) -> Iterator[str]:
    comments = {
        tuple(item.path): item.leading_comments.strip() for item in file.source_code_info.location
    }
    for index, service in enumerate(file.service):
        if not comments.get((6, index)):  # 6: the field number of `service` in FileDescriptorProto
            yield f"service {service.name} has no comment; expected one that says for whom it is"
    for text in filter(None, comments.values()):
        line = text.splitlines()[0]
        if text[-1] not in ".:!?)":
            yield f"comment {line!r} has no full stop; expected sentences"
        if text.lower().startswith("required") and not REQUIRED.match(text):
            yield f"comment {line!r}; expected `Required.` and then what the field is"


def main(root: Path = ROOT) -> int:
    """Prints the problems; 0 when there are none."""
    problems = find_problems(compile_protos(root))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
