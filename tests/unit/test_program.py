"""Both command lines: every word has help, a mistake is one line, and a fault shows no values."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import IO

import click
import pytest
import typer

import central.cli
import edge_node.cli
from lorikeet.program import CANNOT_PRINT, new_program, run

APPS = {"central": central.cli.app, "edge-node": edge_node.cli.app}
MAIN = {"central": central.cli.main, "edge-node": edge_node.cli.main}


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, f"{path} {name}")


ALL = [pair for name, app in APPS.items() for pair in commands(typer.main.get_command(app), name)]


@pytest.mark.parametrize(("path", "command"), ALL, ids=[path for path, _ in ALL])
def test_every_command_option_and_argument_has_a_help_sentence(
    path: str, command: click.Command
) -> None:
    words = [command.help, *(getattr(parameter, "help", None) for parameter in command.params)]
    assert all(word and word[0].isupper() and word.rstrip().endswith(".") for word in words), words


def test_help_shows_arguments_once_and_in_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(APPS["central"], "central", "central", ["releases", "promote", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.count("Its id, the first 6 or more digits") == 1
    assert "[required]" in text
    assert "\\[" not in text


@pytest.mark.parametrize(
    ("program", "arguments", "text"),
    [
        ("central", [], "Missing command. See `central --help`."),
        ("central", ["nodess"], "No such command 'nodess'."),
        ("central", ["tokens"], "Missing command. See `central tokens --help`."),
        ("central", ["tokens", "create", "--uses", "x"], "'x' is not a valid integer."),
        ("central", ["releases", "promote", "v1"], "Missing option '--channel'."),
        ("central", ["releases", "promote", "v1", "--channel", "beta"], "'beta' is not one of"),
        ("central", ["updates", "--state", "away"], "'away' is not one of 'waiting'"),
        ("central", ["updates", "requeue"], "Missing argument 'UPDATE...'."),
        ("central", ["nodes", "list", "extra"], "unexpected extra argument (extra)."),
        ("edge-node", ["status", "--quiet"], "No such option"),
        ("edge-node", ["outbox", "approve"], "Missing argument 'UPDATE_ID'."),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    program: str, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        MAIN[program](arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith(f"{program}: ")
    assert text in printed.err


def one_command(fail: BaseException) -> typer.Typer:
    app = new_program("A program.", "1.2.3")

    @app.command("work")
    def work() -> None:
        raise fail

    return app


def test_an_interrupt_has_an_exit_code() -> None:
    assert run(one_command(KeyboardInterrupt()), "program", "extra", ["work"]) == 130


def test_a_socket_that_breaks_is_not_taken_for_a_reader_that_went_away() -> None:
    with pytest.raises(ConnectionError, match="the socket"):
        run(one_command(BrokenPipeError("the socket")), "program", "extra", ["work"])


PRINTS = """
import sys, typer
from lorikeet.program import complain, new_program, run
app = new_program("A program.", "1")
@app.command("work")
def work(code: int, number: int = 1) -> None:
    input()
    for _ in range(number):
        print("short")
    if code == 3:
        raise LookupError("broken")
    raise typer.Exit(code)
try:
    code = run(app, "program", "extra", None)
except LookupError as error:
    complain(f"program: {error}")
    code = 3
sys.exit(code)
"""
MANY = "--number=100000"
HOW = [("work", "0"), ("work", "1"), ("work", "0", MANY), ("--help",), ("--version",)]
BELOW = ("work", "--help")


def started(
    *arguments: str, stdout: int | IO[bytes], stderr: int | IO[bytes], unbuffered: bool
) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, "-c", PRINTS, *arguments],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        env=environment | ({"PYTHONUNBUFFERED": "1"} if unbuffered else {}),
    )


def run_to_its_end(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Exit code and stderr; the command waits for its input first."""
    with process:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # help reads no input
            process.stdin.write(b"\n")
            process.stdin.close()
        errors = process.stderr.read().decode() if process.stderr is not None else ""
    return process.returncode, errors


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("arguments", [*HOW, BELOW])
def test_a_reader_that_went_away_ends_the_program_quietly(
    arguments: tuple[str, ...], unbuffered: bool
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as stdout:
        process = started(*arguments, stdout=stdout, stderr=subprocess.PIPE, unbuffered=unbuffered)
    assert run_to_its_end(process) == (0, "")


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("arguments", [*HOW, BELOW])
def test_an_output_without_room_is_one_line(arguments: tuple[str, ...], unbuffered: bool) -> None:
    with open("/dev/full", "wb") as stdout:
        process = started(*arguments, stdout=stdout, stderr=subprocess.PIPE, unbuffered=unbuffered)
    code, errors = run_to_its_end(process)
    assert (code, errors.count("\n")) == (CANNOT_PRINT, 1)
    assert errors.startswith("program: Standard output cannot be written ([Errno 28] No space left")


def test_an_error_goes_before_an_output_without_room() -> None:
    with open("/dev/full", "wb") as stdout:
        process = started("work", "3", stdout=stdout, stderr=subprocess.PIPE, unbuffered=False)
    assert run_to_its_end(process) == (3, "program: broken\n")


@pytest.mark.parametrize("arguments", [("work", "3"), ("work", "x")])
def test_an_error_that_cannot_be_shown_has_its_exit_code(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as stderr:
        process = started(*arguments, stdout=subprocess.DEVNULL, stderr=stderr, unbuffered=False)
    assert run_to_its_end(process)[0] == {"3": 3, "x": 2}[arguments[1]]


@pytest.mark.parametrize("module", ["central.cli", "edge_node.cli"])
def test_both_programs_say_that_their_output_has_no_room(module: str) -> None:
    with open("/dev/full", "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"],
            stdout=stdout,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr.count(b"\n")) == (CANNOT_PRINT, 1)


def test_a_package_that_is_not_installed_is_one_line_with_the_extra_to_install(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail = ModuleNotFoundError("No module named 'httpx'", name="httpx")
    assert run(one_command(fail), "program", "extra", ["work"]) == 1
    assert capsys.readouterr().err == (
        "program: The package 'httpx' is not installed. Expected what "
        "`pip install 'lorikeet-federated[extra]'` installs.\n"
    )


FAULT = """
from lorikeet.program import new_program, run
app = new_program("A program.", "1")
@app.command("work")
def work() -> None:
    prompt = "a secret of " + "the patient"
    raise RuntimeError("broken")
run(app, "program", "extra", ["work"])
"""


def test_the_trace_of_a_fault_holds_no_values() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULT], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "RuntimeError: broken" in done.stderr
    assert "the patient" not in done.stderr


@pytest.mark.parametrize("module", ["central.cli", "edge_node.cli"])
def test_a_shell_can_complete_the_commands(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {"central.cli": "central", "edge_node.cli": "edge-node"}[module]
    variable = f"_{name.replace('-', '_').upper()}_COMPLETE"
    monkeypatch.setenv(variable, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"{name} s")
    monkeypatch.setenv("COMP_CWORD", "1")
    done = subprocess.run(
        [sys.executable, "-m", module], capture_output=True, text=True, check=False, timeout=60
    )
    assert "serve" in done.stdout.split(), done.stderr
