"""An episode with a scripted model: which tokens were sampled, when it ends, how it is judged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from edge_node.environments import Episode, Task
from edge_node.episodes import Call, Rules, Trajectory, Turn, read_calls, run_episode
from edge_node.errors import EnvironmentFault, ServingError
from tests.fakes.episodes_here import Here
from tests.fakes.letters import END, call, ids, rules
from tests.fakes.safe_environment import Safe

(TASK,) = Safe().tasks("train", count=1, seed=0)


class Script:
    """A model that says these texts; one of kind str ends by itself, other turns are given."""

    def __init__(self, *says: str | Turn) -> None:
        self._says = [
            Turn([*ids(one), END], [-0.5] * (len(one) + 1), True) if isinstance(one, str) else one
            for one in says
        ]
        self.asked: list[tuple[list[int], int, int]] = []

    async def __call__(self, prompt: Sequence[int], most: int, turn: int) -> Turn:
        self.asked.append((list(prompt), most, turn))
        if turn >= len(self._says):
            raise ServingError("no more")
        return self._says[turn]


LOOK, TYPE = call("look_up", safe=0), call("type_code", code="0")


def play(model: Script, how: str = "", here: Here | None = None, **bounds: Any) -> Trajectory:
    episodes = here or Here(how)
    try:
        return asyncio.run(run_episode(rules(**bounds), episodes, TASK, model))
    finally:
        assert not episodes.open, "an episode is always closed"


def test_only_what_the_model_sampled_is_marked_and_nothing_is_tokenized_twice() -> None:
    model = Script("I see. " + LOOK, TYPE, "done")
    way = play(model)
    assert (way.turns, way.reward, way.passed) == (3, 1.0, True)
    between = [
        '\n<t>{"code": "0"}\N{END OF TEXT}\n<a>',
        "\n<t>open\N{END OF TEXT}\n<a>",
    ]
    said = ["I see. " + LOOK, TYPE, "done"]
    whole: list[int] = []
    marks: list[bool] = []
    for number, text in enumerate(said):
        whole += [*ids(text), END]
        marks += [True] * (len(text) + 1)
        if number < 2:
            whole += ids(between[number])
            marks += [False] * len(between[number])
    assert way.token_ids == whole
    assert way.sampled == marks
    assert way.logprobs == [-0.5 if mark else 0.0 for mark in marks]
    # Each turn is asked with exactly what was sampled and told before it.
    assert [asked for asked, _, _ in model.asked] == [
        way.ids[: len(way.prompt_ids) + length]
        for length in (0, len(said[0]) + 1 + len(between[0]), len(whole) - 5)
    ]
    assert way.prompt_ids == ids('<s>["look_up", "type_code"]\x03<u>open safe 0!\x03\n<a>')


def test_several_calls_of_one_turn_are_run_in_their_order() -> None:
    way = play(Script(LOOK + TYPE, "done"))
    assert way.reward == 1
    text = "".join(chr(one - 100) for one in way.token_ids if one != END)
    assert '<t>{"code": "0"}' in text
    assert text.index('{"code": "0"}\n') < text.index("<t>open")


def test_an_answer_without_a_call_ends_it_and_is_judged() -> None:
    way = play(Script("I do not know"))
    assert (way.turns, way.reward, way.passed) == (1, 0.0, False)
    assert all(way.sampled)


def test_the_calls_of_the_last_turn_are_run_and_nothing_is_told_after_it() -> None:
    way = play(Script(LOOK, TYPE, "never asked"), turns=2)
    assert (way.turns, way.reward) == (2, 1.0)
    assert way.sampled[-1], "it ends with what was sampled"


def test_a_turn_that_was_cut_has_no_calls() -> None:
    cut = Turn(ids(TYPE), [0.0] * len(TYPE), False)
    assert play(Script(cut)).reward == 0


def test_it_ends_where_no_room_is_left() -> None:
    prompt = len(ids('<s>["look_up", "type_code"]\x03<u>open safe 0!\x03\n<a>'))
    model = Script(LOOK, TYPE)
    way = play(model, context=prompt + len(LOOK) + 10)
    assert (way.turns, way.reward) == (1, 0.0)
    assert [most for _, most, _ in model.asked] == [len(LOOK) + 10]
    assert all(way.sampled)
    model = Script(LOOK, TYPE, "x")
    play(model, answer_tokens=70)
    assert [most for _, most, _ in model.asked] == [70, 70, 70]
    assert play(Script(), context=prompt).token_ids == []


def test_what_goes_wrong_in_a_call_is_told() -> None:
    wrong = '<tool_call>{"name": "look_up", "arguments": [1]}</tool_call>'
    way = play(Script(call("look_up", safe=9) + call("fly") + wrong, "x"))
    text = "".join(chr(one - 100) for one in way.token_ids if one != END)
    assert "<t>LookupError: no safe 9" in text
    assert "<t>LookupError: no tool is named fly" in text
    assert "<t>TypeError: arguments are a list; expected a JSON object" in text


def test_no_reward_is_no_bad_mark() -> None:
    way = play(Script("x"), "none")
    assert (way.reward, way.passed) == (None, False)


def test_an_opening_stands_at_the_end_of_the_first_words_of_the_user() -> None:
    assert ids("safe 0!") == play(Script("x")).prompt_ids[-12:-5]
    assert ids("safe 0") == play(Script("x"), "silent").prompt_ids[-11:-5]


class Faulty(Here):
    def start(self, task: Task) -> Episode:
        raise EnvironmentFault("safe", "it raised", raised=True)


@pytest.mark.parametrize(
    ("here", "model", "error"),
    [(Faulty, Script("x"), EnvironmentFault), (Here, Script(LOOK), ServingError)],
)
def test_faults_pass_through(
    here: Callable[[], Here], model: Script, error: type[Exception]
) -> None:
    with pytest.raises(error):
        play(model, here=here())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hello", []),
        (call("a", x=1), [Call("a", {"x": 1})]),
        ("so " + call("a") + "\n" + call("b", y=[2]), [Call("a", {}), Call("b", {"y": [2]})]),
        ('<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>', [Call("a", {})]),
        ('<tool_call>{"name": "a", "arguments": {}}', [Call("a", {})]),
        (call("a") + "<tool_call>{", []),
        ('<tool_call>{"name": "a"}</tool_call>', []),
        ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', []),
        ("<tool_call>[1]</tool_call>", []),
        ("<tool_call>" + "[" * 100_000, []),
    ],
)
def test_calls_are_read_in_the_hermes_format(text: str, found: list[Call]) -> None:
    assert read_calls(text) == found


def test_rules_bound_a_turn() -> None:
    bounded: Rules = rules(answer_tokens=10, context=100)
    assert (bounded.room(50), bounded.room(95), bounded.room(100)) == (10, 5, 0)
    assert rules(answer_tokens=None, context=100).room(40) == 60
