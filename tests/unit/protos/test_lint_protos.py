"""The proto lint: ours pass, and every rule can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lint_protos import ROOT, compile_protos, find_problems, main

GOOD = """syntax = "proto3";

package lorikeet.nest.v1;

enum EggState {
  EGG_STATE_UNSPECIFIED = 0;
  EGG_STATE_LAID = 1;
}

message LayEggRequest {
  // Required. Who lays it.
  string bird_id = 1;
}

message LayEggResponse {
  EggState state = 1;
}

// For birds.
service NestService {
  rpc LayEgg(LayEggRequest) returns (LayEggResponse);
}
"""


def lint(root: Path, text: str) -> list[str]:
    folder = root / "protos" / "nest" / "v1"
    folder.mkdir(parents=True)
    (folder / "nest.proto").write_text(text)
    return find_problems(compile_protos(root))


def test_our_protos_are_clean() -> None:
    assert find_problems(compile_protos(ROOT)) == []
    assert main() == 0


def test_a_good_proto_is_clean(tmp_path: Path) -> None:
    assert lint(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "package lorikeet.nest.v1",
            "package lorikeet.tree.v1",
            "package 'lorikeet.tree.v1'; expected 'lorikeet.nest.v1'",
        ),
        ('syntax = "proto3";', 'syntax = "proto2";', "expected 'proto3'"),
        ("EGG_STATE_UNSPECIFIED", "EGG_STATE_NONE", "is zero; expected EGG_STATE_UNSPECIFIED"),
        ("EGG_STATE_LAID", "LAID", "enum value LAID; expected EGG_STATE_"),
        ("bird_id", "birdId", "field LayEggRequest.birdId; expected lower_snake_case"),
        ("NestService", "Nest", "service Nest; expected PascalCase ending in Service"),
        ("rpc LayEgg(", "rpc PutEgg(", "expected lorikeet.nest.v1.PutEggRequest"),
        (
            "returns (LayEggResponse)",
            "returns (LayEggRequest)",
            "expected lorikeet.nest.v1.LayEggResponse",
        ),
        ("// Required. Who", "// Required who", "expected `Required.`"),
        ("// Required. Who lays it.", "// Who lays it", "has no full stop"),
        ("// For birds.\n", "", "service NestService has no comment"),
        (
            "message LayEggResponse {",
            "message egg {}\n\nmessage LayEggResponse {",
            "message egg; expected PascalCase",
        ),
    ],
)
def test_every_rule_can_fail(tmp_path: Path, old: str, new: str, problem: str) -> None:
    text = GOOD.replace(old, new)
    if "proto2" in new:
        text = text.replace("  string", "  optional string").replace(
            "  EggState state", "  optional EggState state"
        )
    assert any(problem in line for line in lint(tmp_path, text))


def test_a_proto_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="protoc compiled nothing"):
        lint(tmp_path, GOOD.replace("message", "massage"))
