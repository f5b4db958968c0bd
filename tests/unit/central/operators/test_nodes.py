"""`central nodes`: what nodes say of themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from central.cli.nodes import print_nodes
from protos.fleet.v1 import fleet_pb2
from protos.operators.v1 import operators_pb2


def listed(
    capsys: pytest.CaptureFixture[str],
    *,
    as_json: bool,
    problems: Sequence[fleet_pb2.Problem] = (),
    unusable: dict[str, int] | None = None,
) -> str:
    status = fleet_pb2.NodeStatus(
        channel="stable", problems=problems, unusable_experiences=unusable
    )
    node = operators_pb2.Node(node_id="a-1", cohort="shared", connected=True, status=status)
    answer = operators_pb2.ListNodesResponse(nodes=[node])
    print_nodes(answer, as_json)
    return capsys.readouterr().out


def test_each_problem_of_a_node_is_shown_with_since_and_next_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    away = fleet_pb2.Problem(
        room="uploads",
        text="It is\x1b[2J away.",
        next_step="Wait.",
        since="2026-11-26T00:00:00+00:00",
    )
    full = fleet_pb2.Problem(
        room="disk", text="5 MiB free.", next_step="Free some.", since="2026-11-25T00:00:00+00:00"
    )
    table, row, *rest = listed(capsys, as_json=False, problems=[full, away]).splitlines()
    assert table.endswith("problems")
    assert row.endswith("disk, uploads")
    assert rest == [
        "a-1  disk, since 2026-11-25T00:00:00+00:00: 5 MiB free.",
        "    Next: Free some.",
        "a-1  uploads, since 2026-11-26T00:00:00+00:00: It is [2J away.",
        "    Next: Wait.",
    ]
    [plain] = json.loads(listed(capsys, as_json=True, problems=[full, away]))
    assert [problem["room"] for problem in plain["status"]["problems"]] == ["disk", "uploads"]
    assert len(listed(capsys, as_json=False, problems=[]).splitlines()) == 2


def test_why_answers_of_a_node_cannot_be_learnt_from_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    unusable = {"it is too\x1b[2J long": 2, "a tool was called": 1}
    _, _, *rest = listed(capsys, as_json=False, unusable=unusable).splitlines()
    assert rest == [
        "a-1  answers that cannot be learnt from: 1 because a tool was called; 2 because it is too "
        "[2J long"
    ]
    [plain] = json.loads(listed(capsys, as_json=True, unusable=unusable))
    assert plain["status"]["unusable_experiences"] == unusable
