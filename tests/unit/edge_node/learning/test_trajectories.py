from __future__ import annotations

from edge_node.agent_runs import RunEnd
from edge_node.episodes import Trajectory
from edge_node.learning.trajectories import drawn, join_turns
from edge_node.serving import Turn

YES, NO = True, False


def turn(prompt: list[int], answer: list[int]) -> Turn:
    return Turn(prompt, answer, [-float(token) for token in answer])


def test_a_turn_that_goes_on_is_joined_and_what_was_told_is_masked() -> None:
    start = [1, 2, 3, 4, 8, 9]
    turns = [turn([1, 2], [3, 4]), turn(start, [5]), turn([*start, 5], [6])]
    logprobs = [-3.0, -4.0, 0.0, 0.0, -5.0, -6.0]
    assert join_turns(turns) == [
        Trajectory([1, 2], [3, 4, 8, 9, 5, 6], logprobs, [YES, YES, NO, NO, YES, YES], turns=3)
    ]


def test_a_turn_whose_prompt_is_another_is_a_sequence_of_its_own() -> None:
    """The template wrote the answer [3, 4] as [7]."""
    turns = [turn([1, 2], [3, 4]), turn([1, 2, 7, 8], [5])]
    assert join_turns(turns) == [
        Trajectory([1, 2], [3, 4], [-3.0, -4.0], [YES, YES], turns=1),
        Trajectory([1, 2, 7, 8], [5], [-5.0], [YES], turns=1),
    ]


def test_each_of_two_conversations_goes_on() -> None:
    turns = [turn([1], [2]), turn([9], [8]), turn([1, 2, 3], [4]), turn([9, 8, 7], [6])]
    first, second = join_turns(turns)
    assert (first.prompt_ids, first.token_ids, first.sampled) == ([1], [2, 3, 4], [YES, NO, YES])
    assert (second.prompt_ids, second.token_ids, second.sampled) == ([9], [8, 7, 6], [YES, NO, YES])


def test_a_second_try_of_a_turn_keeps_its_own_context() -> None:
    turns = [turn([1], [2]), turn([1, 2, 3], [4]), turn([1, 2, 3], [5])]
    assert [(one.prompt_ids, one.token_ids) for one in join_turns(turns)] == [
        ([1], [2, 3, 4]),
        ([1, 2, 3], [5]),
    ]


def test_the_longest_sequence_goes_on() -> None:
    """Two first turns with one prompt, of which one answer begins with the other."""
    turns = [turn([1], [2]), turn([1], [2, 3]), turn([1, 2, 3, 4], [5])]
    assert [one.token_ids for one in join_turns(turns)] == [[2], [2, 3, 4, 5]]


TWO = [turn([1], [2]), turn([9], [8, 7, 6])]
"""Two sequences, of one sampled token and of three."""


def test_a_round_learns_from_one_sequence_of_a_run_each_token_as_often() -> None:
    found = [drawn(RunEnd(0.5, TWO), seed) for seed in range(400)]
    assert {way.reward for way in found if way is not None} == {0.5}
    short = sum(way is not None and way.prompt_ids == [1] for way in found)
    assert 70 < short < 130, "a quarter of the sampled tokens"
    assert drawn(RunEnd(0.5, TWO), 3) == found[3]


def test_there_is_nothing_to_learn_without_a_reward_or_a_sampled_token() -> None:
    assert drawn(RunEnd(None, TWO), 0) is None, "a fault of the infrastructure is no bad mark"
    assert drawn(RunEnd(0.0, []), 0) is None
    assert drawn(RunEnd(0.0, [turn([1], [])]), 0) is None
    image = Turn([1], [2], [-0.1], text_only=False)
    assert drawn(RunEnd(1.0, [*TWO, image]), 0) is None
    zero = drawn(RunEnd(0.0, TWO), 0)
    assert zero is not None
    assert zero.reward == 0.0
