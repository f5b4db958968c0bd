"""What `edge-node environments check` says of an environment with tools; without a worker."""

from __future__ import annotations

import pytest

from edge_node.environments.checking import Findings, _check_episodes
from edge_node.settings import EnvironmentSpec
from tests.fakes.episodes_here import Here


@pytest.mark.parametrize(
    ("how", "anchor", "expected"),
    [
        ("", False, []),
        ("", True, ["It is an anchor, and knows no answers that a round could learn from."]),
        ("open already", False, ["Without a call 20 of 20 tasks pass, first 'safe-0'."]),
        ("none", False, ["20 of 20 tasks get no reward."]),
        (
            "differs",
            False,
            ["Two episodes of one task begin or are judged differently for 20 of 20 tasks, first "
             "'safe-0'."],
        ),
    ],
)  # fmt: skip
def test_an_episode_of_each_task_is_played_without_a_call(
    how: str, anchor: bool, expected: list[str]
) -> None:
    found, here = Findings("safe"), Here(how)
    _check_episodes(found, EnvironmentSpec(name="safe", factory="x:Y", anchor=anchor), here, 10)
    assert [wrong.what for wrong in found.wrong] == expected
    assert all(wrong.next_step for wrong in found.wrong)
    assert found.tools == ["look_up", "type_code"]
    assert not here.open
