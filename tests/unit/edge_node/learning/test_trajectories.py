from __future__ import annotations

from edge_node.learning.trajectories import Trajectory, join_turns
from edge_node.serving import Turn


def turn(prompt: list[int], answer: list[int]) -> Turn:
    return Turn(prompt, answer, [-float(token) for token in answer])


def test_a_turn_that_goes_on_is_joined_and_what_was_told_is_masked() -> None:
    start = [1, 2, 3, 4, 8, 9]
    turns = [turn([1, 2], [3, 4]), turn(start, [5]), turn([*start, 5], [6])]
    logprobs = [-3.0, -4.0, 0.0, 0.0, -5.0, -6.0]
    assert join_turns(turns) == [
        Trajectory([1, 2], [3, 4, 8, 9, 5, 6], [1, 1, 0, 0, 1, 1], logprobs)
    ]
    assert join_turns(turns)[0].sampled == 4


def test_a_turn_whose_prompt_is_another_is_a_sequence_of_its_own() -> None:
    """The template wrote the answer [3, 4] as [7]."""
    turns = [turn([1, 2], [3, 4]), turn([1, 2, 7, 8], [5])]
    assert join_turns(turns) == [
        Trajectory([1, 2], [3, 4], [1, 1], [-3.0, -4.0]),
        Trajectory([1, 2, 7, 8], [5], [1], [-5.0]),
    ]


def test_each_of_two_conversations_goes_on() -> None:
    turns = [turn([1], [2]), turn([9], [8]), turn([1, 2, 3], [4]), turn([9, 8, 7], [6])]
    first, second = join_turns(turns)
    assert (first.prompt_ids, first.completion_ids, first.mask) == ([1], [2, 3, 4], [1, 0, 1])
    assert (second.prompt_ids, second.completion_ids, second.mask) == ([9], [8, 7, 6], [1, 0, 1])


def test_a_second_try_of_a_turn_keeps_its_own_context() -> None:
    turns = [turn([1], [2]), turn([1, 2, 3], [4]), turn([1, 2, 3], [5])]
    assert [(one.prompt_ids, one.completion_ids) for one in join_turns(turns)] == [
        ([1], [2, 3, 4]),
        ([1, 2, 3], [5]),
    ]


def test_the_longest_sequence_goes_on() -> None:
    """Two first turns with one prompt, of which one answer begins with the other."""
    turns = [turn([1], [2]), turn([1], [2, 3]), turn([1, 2, 3, 4], [5])]
    assert [one.completion_ids for one in join_turns(turns)] == [[2], [2, 3, 4, 5]]
