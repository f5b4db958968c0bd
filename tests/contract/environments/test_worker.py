"""An environment in its worker: the same verdicts, and every way to break the contract."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from edge_node.environments import EnvironmentProcess, TextEnvironment, verify_all
from edge_node.environments import child as child_module
from edge_node.errors import EnvironmentFault, SettingsError
from edge_node.settings import EnvironmentSpec
from tests.fakes.broken_environments import SECRET, made
from tests.fakes.text_environment import Texts
from tests.fakes.word_environment import NextWord


def test_tasks_and_verdicts_are_those_of_the_plug_in() -> None:
    inside = NextWord(0, 60)
    spec = EnvironmentSpec(
        name="words", factory="tests.fakes.word_environment:NextWord", options={"last": 60}
    )
    with EnvironmentProcess(spec) as process:
        environment = process.environment()
        tasks = environment.tasks("held_out", count=20, seed=3)
        known = inside.tasks("held_out", count=20, seed=3)
        assert [(t.id, t.messages) for t in tasks] == [(t.id, t.messages) for t in known]
        answers = [inside.reference_answer(task) for task in known]
        assert [environment.reference_answer(task) for task in tasks] == answers
        told = ["wrong \ud800" if number % 2 else right for number, right in enumerate(answers)]
        wanted = [inside.verify(task, answer) for task, answer in zip(known, told, strict=True)]
        pairs = list(zip(tasks, told, strict=True))
        assert verify_all(process, pairs) == wanted
        assert [environment.verify(*pair) for pair in pairs] == wanted


def test_a_plug_in_gets_its_own_task_back_whatever_it_holds() -> None:
    with made("OwnKind") as process:
        environment = process.environment()
        (task,) = environment.tasks("train", count=1, seed=0)
        right = f"w{int(task.messages[0]['content'][1:]) + 1}"
        assert environment.verify(task, right).passed
        assert not environment.verify(task, "else").passed


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("hang", "gave no answer to verify within 1 s"),
        ("crash", r"ended in verify \(killed by SIGSEGV\)"),
        ("exit", r"ended in verify \(exit code 3\)"),
        ("nameless signal", r"ended in verify \(killed by signal \d+\)"),
        ("text on the link", "wrote into its worker's link"),
        ("list on the link", "wrote into its worker's link"),
        ("memory", "needed more than 256 MiB of memory in verify"),
        ("raise", r"raised KeyError in verify \(broken_environments.py:\d+\)"),
        ("no outcome", "gave a NoneType without passed"),
        ("passed", "has a str for passed"),
        ("score", "has a str for score"),
        ("nan", "has score nan; expected a number from 0 to 1"),
        ("high", "has score 1.5"),
        ("low", "has score -0.1"),
        ("reason", "has a NoneType for reason"),
        ("correction", "has a int for correction"),
        ("half", "has a correction that has half of a surrogate pair at character 0"),
    ],
)
def test_a_verifier_that_fails_is_a_fault_that_says_how(
    how: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with made("Verifying", how, call_timeout_s=1, memory_mb=256) as process:
        environment = process.environment()
        (task,) = environment.tasks("train", count=1, seed=0)
        with pytest.raises(EnvironmentFault, match=expected) as caught:
            environment.verify(task, SECRET)
    assert str(caught.value).startswith("Environment 'acme' ")
    assert caught.value.raised == (how == "raise")
    told = str(caught.value) + caplog.text + repr([vars(record) for record in caplog.records])
    assert "secret" not in told


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("none", "gave a NoneType for tasks"),
        ("twice", "gave task 'train/.*' twice"),
        ("many", "gave more tasks than it was asked for; expected at most 3"),
        ("id", "whose id is a int"),
        ("empty id", "whose id is a str; expected a text that is not empty"),
        ("no messages", "made task 't' without messages"),
        ("a text", "made task 't' without messages"),
        ("no role", "made task 't' with a message that has no role or no content"),
        ("parts", "made task 't' with a message that is not all text"),
        ("data", "made task 't' with data that cannot be kept"),
        ("half id", "made a task whose id has half of a surrogate pair at character 1"),
        ("half content", r"task 't' with a message that has half of a surrogate pair"),
        ("weight 0", "'t' whose weight is 0; expected more than 0, and 1e\\+06 at most"),
        ("weight nan", "'t' whose weight is nan; expected more than 0"),
        ("weight text", "'t' whose weight is a str; expected a number"),
        ("weight high", "'t' whose weight is 1e\\+09; expected more than 0"),
        ("difficulty text", "'t' whose difficulty is a str; expected a whole number, or None"),
        ("difficulty low", "'t' whose difficulty is out of range; expected 0 to 1000"),
        ("difficulty half", "'t' whose difficulty is a float; expected a whole number"),
    ],
)
def test_tasks_that_break_the_contract_are_a_fault_that_says_how(how: str, expected: str) -> None:
    with made("Tasks", how) as process, pytest.raises(EnvironmentFault, match=expected) as caught:
        process.environment().tasks("train", count=3, seed=0)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("crash", r"ended in documents \(killed by SIGSEGV\)"),
        ("raise", r"raised KeyError in documents \(broken_environments.py:\d+\)"),
        ("twice", "gave document 'train/.*' twice"),
        ("number", "made document 'd' whose text is a int"),
        ("half", "made document 'd' whose text has half of a surrogate pair at character 2"),
    ],
)
def test_documents_that_break_the_contract_are_a_fault_that_says_how(
    how: str, expected: str
) -> None:
    with made("Reading", how) as process:
        environment = process.environment()
        assert isinstance(environment, TextEnvironment)
        with pytest.raises(EnvironmentFault, match=expected):
            environment.documents("train", count=3, seed=0)


def test_documents_are_those_of_the_plug_in() -> None:
    spec = EnvironmentSpec(name="text", factory="tests.fakes.text_environment:Texts")
    with EnvironmentProcess(spec) as process:
        assert process.start() == "texts"
        environment = process.environment()
        assert isinstance(environment, TextEnvironment)
        known = Texts().documents("held_out", count=9, seed=3)
        assert environment.documents("held_out", count=9, seed=3) == known


def test_a_reference_answer_that_is_no_text_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "mended").touch()
    with made("Tasks", "answer", str(tmp_path / "mended")) as process:
        environment = process.environment()
        (task,) = environment.tasks("train", count=1, seed=0)
        with pytest.raises(EnvironmentFault, match="has a int for reference_answer"):
            environment.reference_answer(task)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("crash", r"ended in load \(killed by SIGSEGV\)"),
        ("memory", "needed more than 256 MiB of memory in load"),
        ("no value on the link", "wrote into its worker's link"),
    ],
)
def test_an_environment_that_fails_while_it_is_loaded(how: str, expected: str) -> None:
    with (
        made("Loading", how, memory_mb=256) as process,
        pytest.raises(EnvironmentFault, match=expected),
    ):
        process.start()


def test_an_environment_that_hangs_while_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "LOAD_S", 0.1)
    with (
        made("Loading", "hang", call_timeout_s=0.1) as process,
        pytest.raises(EnvironmentFault, match=r"gave no answer to load within 0\.1 s"),
    ):
        process.start()


def test_a_mistake_in_the_settings_is_told_as_the_loader_tells_it() -> None:
    spec = EnvironmentSpec(name="acme", factory="no.such.module:Thing")
    with EnvironmentProcess(spec) as process:
        with pytest.raises(SettingsError, match="cannot be imported") as caught:
            process.start()
        assert "Environment 'acme': factory 'no.such.module:Thing'" in str(caught.value)


def test_what_central_may_get_of_a_load_that_fails_quotes_no_option_and_no_plug_in() -> None:
    spec = EnvironmentSpec(
        name="acme",
        factory="tests.fakes.broken_environments:Loading",
        options={"how": "raise", "password": SECRET},
    )
    with (
        EnvironmentProcess(spec) as process,
        pytest.raises(EnvironmentFault, match=r"'acme' cannot be loaded; .* check acme") as caught,
    ):
        process.environment()
    assert "secret" not in str(caught.value)


def test_what_an_environment_prints_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    with made("Verifying", "shout") as process:
        environment = process.environment()
        (task,) = environment.tasks("train", count=1, seed=0)
        assert not environment.verify(task, "x").passed
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err


def test_a_fork_that_comes_back_out_of_a_verifier_gives_no_verdict() -> None:
    with made("Verifying", "fork", call_timeout_s=5) as process:
        environment = process.environment()
        tasks = environment.tasks("train", count=3, seed=0)
        right = [f"w{int(task.messages[0]['content'][1:]) + 1}" for task in tasks]
        answers = list(zip(tasks, [right[0], "else", right[2]], strict=True))
        assert [outcome.passed for outcome in verify_all(process, answers)] == [True, False, True]


def test_the_worker_does_not_see_the_nodes_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_CENTRAL__JOIN_TOKEN", "secret")
    monkeypatch.setenv("edge_central__join_token", "secret")  # the settings read this one too
    with made("Verifying", "raise") as process:
        process.start()
        started = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert b"EDGE_" not in started.upper()
        assert b"PATH=" in started
        assert b"how" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
