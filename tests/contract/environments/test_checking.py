"""`edge-node environments`: what an author learns of an environment before a node relies on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_node.environments.checking import check_environment, list_environment
from edge_node.environments.checking_levels import Level
from edge_node.settings import EnvironmentSpec
from tests.fakes.broken_environments import SECRET, made

ROOT = Path(__file__).resolve().parents[3]


def test_a_good_environment_has_nothing_wrong_and_its_numbers() -> None:
    found = check_environment(made("Checked", "good").spec, 20)
    assert found.wrong == []
    assert (found.kind, found.noun, found.shared, found.reference_answers) == (
        "tasks",
        "tasks",
        0,
        40,
    )
    assert 20 < found.distinct["train"] <= 40
    assert found.scores == (0.0, 1.0)
    assert found.tasks_ms is not None
    assert found.verify_ms is not None


def test_a_good_environment_of_texts_has_nothing_wrong() -> None:
    spec = EnvironmentSpec(name="text", factory="tests.fakes.text_environment:Texts")
    found = check_environment(spec, 10)
    assert found.wrong == []
    assert (found.kind, found.noun, found.scores) == ("texts", "documents", None)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("no tasks", ["There are no train tasks.", "There are no held_out tasks."]),
        ("count", ["20 train tasks do not begin with the 10 of a smaller count."]),
        ("process", ["The same arguments gave other train tasks in another one."]),
        ("time", ["The same arguments gave other train tasks in the same process."]),
        ("repeats", ["1 of 20 train tasks repeat the text of another."]),
        ("empty", ["An empty answer passes for 40 of 40 tasks, first 'train/"]),
        ("reference", ["The reference answer fails for 40 of 40 tasks, first 'train/"]),
    ],
)
def test_what_is_wrong_is_named(how: str, expected: list[str]) -> None:
    found = check_environment(made("Checked", how).spec, 20)
    said = [wrong.what for wrong in found.wrong]
    for text in expected:
        assert any(line.startswith(text) for line in said), said
    assert all(wrong.next_step for wrong in found.wrong)


def test_texts_in_both_splits_are_counted() -> None:
    found = check_environment(made("Checked", "shared").spec, 20)
    assert found.shared > 0
    assert f"{found.shared} texts are in train and in held_out." in [w.what for w in found.wrong]


def test_rewards_are_shown_by_difficulty_and_weights_are_named() -> None:
    found = check_environment(made("Checked", "levels").spec, 20)
    assert found.wrong == []
    assert found.levels == [Level(1, 20, 1.0, 0.0), Level(None, 20, 1.0, 0.0)]
    assert found.weights == (1.0, 3.0)
    plain = check_environment(made("Checked", "good").spec, 20)
    assert (plain.levels, plain.weights) == ([], None)


def test_only_an_anchor_must_know_answers() -> None:
    spec = made("Checked", "unknown").spec
    assert check_environment(spec, 5).wrong == []
    (wrong,) = check_environment(spec.model_copy(update={"anchor": True}), 5).wrong
    assert wrong.what == "It is an anchor and knows no answer to 10 of its tasks."


@pytest.mark.parametrize(
    ("kind", "how", "expected"),
    [
        ("Verifying", "nan", "has score nan"),
        ("Verifying", "raise", "raised KeyError in verify"),
        ("Loading", "crash", "ended in load"),
    ],
)
def test_a_fault_is_what_is_wrong(kind: str, how: str, expected: str) -> None:
    (wrong,) = check_environment(made(kind, how).spec, 5).wrong
    assert expected in wrong.what


def test_the_list_says_what_loads() -> None:
    good = list_environment(made("Checked", "good").spec)
    assert (good.name, good.kind, good.anchor, good.state) == ("acme", "tasks", False, "ready")
    missing = list_environment(EnvironmentSpec(name="gone", factory="no.such.module:Thing"))
    assert missing.kind is None
    assert "cannot be imported" in missing.state


LIGHT = """
import runpy, sys
sys.argv = ["edge-node", *sys.argv[1:]]
try:
    runpy.run_module("edge_node.cli", run_name="__main__")
finally:
    heavy = {"torch", "vllm", "transformers"} & set(sys.modules)
    assert not heavy, heavy
"""


def command(*arguments: str, environments: list[dict[str, Any]]) -> tuple[int, str, str]:
    clean = {name: text for name, text in os.environ.items() if not name.startswith("EDGE_")}
    ended = subprocess.run(
        [sys.executable, "-c", LIGHT, "environments", *arguments],
        env=clean | {"EDGE_ENVIRONMENTS": json.dumps(environments)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


def test_the_commands_print_and_end_as_they_say() -> None:
    fakes = "tests.fakes.broken_environments"
    good = {"name": "good", "factory": f"{fakes}:Checked", "options": {"how": "good"}}
    loud = {"name": "loud", "factory": f"{fakes}:Verifying", "options": {"how": "shout"}}
    gone = {"name": "gone", "factory": "no.such.module:Thing", "anchor": True}
    code, out, _ = command("list", environments=[good, gone])
    assert code == 1
    first, second, last = out.splitlines()
    assert first.split()[:2] == ["good", "tasks"]
    assert first.endswith("ready")
    assert "cannot be imported" in second
    assert "network is open" in last
    code, out, err = command("check", "loud", "--tasks", "3", "--json", environments=[good, loud])
    (found,) = json.loads(out)
    assert (code, found["name"], found["wrong"]) == (0, "loud", [])
    assert SECRET in err, "the author sees what it prints"
    levels = good | {"options": {"how": "levels"}}
    _, out, _ = command("check", "good", "--tasks", "4", environments=[levels])
    assert "  weights of train tasks: 1 to 3\n" in out
    level = "4 tasks; mean reward 1 for reference answers, 0 for nothing of use\n"
    assert f"  difficulty 1: {level}  difficulty none: {level}" in out
    code, out, _ = command("check", "gone", environments=[gone])
    assert code == 1
    assert out.startswith("FAIL gone\n  Wrong: Environment 'gone'")
    assert "    Next: " in out
    code, _, err = command("check", "else", environments=[good])
    assert (code, "No environment to check is named 'else'" in err) == (1, True)
