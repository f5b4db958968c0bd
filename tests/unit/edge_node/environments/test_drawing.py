from __future__ import annotations

from collections import Counter

from edge_node.environments import Task, by_weight
from edge_node.environments.checking_levels import Level, levels


def test_tasks_of_equal_weight_stay_as_they_are() -> None:
    assert by_weight("abc", [2.0, 2.0, 2.0], 9, 0) == "abc"
    assert by_weight([], [], 9, 0) == []


def test_a_task_is_drawn_as_often_as_its_weight_says() -> None:
    drawn = by_weight("abc", [1.0, 4.0, 5.0], 4000, 7)
    assert drawn == by_weight("abc", [1.0, 4.0, 5.0], 4000, 7)
    assert drawn != by_weight("abc", [1.0, 4.0, 5.0], 4000, 8)
    counts = Counter(drawn)
    assert [round(counts[name] / 400) for name in "abc"] == [1, 4, 5]


def test_rewards_by_difficulty_from_the_easiest_to_the_hardest() -> None:
    easy, hard, other = (Task(f"t{level}", [], difficulty=level) for level in (2, 10, None))
    right = [(hard, 0.5), (easy, 1.0)]
    useless = [(easy, 0.0), (easy, 0.5), (other, 0.25)]
    assert levels(right, useless) == [
        Level(2, 1, 1.0, 0.25),
        Level(10, 1, 0.5, None),
        Level(None, 1, None, 0.25),
    ]
    assert levels([], [(other, 0.0)]) == []
