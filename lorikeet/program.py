"""A command line: plain help, and one clear line on stderr for every mistake.

In: a name, what the program is, and the arguments. Out: an exit code.
Guarantees: an error never shows the values of local variables, which may be prompts. A reader that
went away ends the program quietly; an output that takes nothing more is an error.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any, TextIO, cast

import click
import typer
import typer.core
import typer.main

CANNOT_PRINT = 5
"""Exit code of a program whose standard output cannot be written."""


class _Argument(typer.core.TyperArgument):
    def __init__(self, *, help: str | None = None, **settings: Any) -> None:
        super().__init__(help=help, **settings)
        self.help = help


# Faults of typer 0.20, the newest that Flower admits. With click 8.5 it loses the help of
# arguments, or shows it twice; beside an installed rich it writes "\\[required]" into plain help.
typer.main.TyperArgument = _Argument  # type: ignore[attr-defined]
typer.core.TyperCommand.format_options = click.Command.format_options  # type: ignore[method-assign]
typer.core.HAS_RICH = False


class Program(typer.core.TyperGroup):
    """The outermost command."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            # Of a socket, since stdout raises CannotPrint. typer would end without a word.
            raise ConnectionError(str(error)) from error


class CannotPrint(Exception):
    """Stdout takes nothing more. No OSError, which typer would take for its own."""


class _Output:
    """Stdout; what cannot be written raises CannotPrint."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise CannotPrint from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise CannotPrint from error


def _or_before(context: typer.Context, given: bool) -> bool:
    """`central nodes --json list` means `central nodes list --json`."""
    before = context.parent.params if context.parent else {}
    return given or bool(before.get("as_json"))


Json = Annotated[
    bool, typer.Option("--json", help="Print JSON, for machines.", callback=_or_before)
]
"""The option of commands that print; their parameter is `as_json`."""


def new_program(about: str, version: str) -> typer.Typer:
    """An app without commands; `about` is its help."""
    app = typer.Typer(
        cls=Program,
        help=about,
        rich_markup_mode=None,
        suggest_commands=False,  # click does it
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def print_version(wanted: bool) -> None:
        if wanted:
            print(version)
            raise typer.Exit

    option = typer.Option(
        False, "--version", help="Print the version.", callback=print_version, is_eager=True
    )

    @app.callback()
    def outermost(version: bool = option) -> None:
        pass

    return app


def run(app: typer.Typer, name: str, extra: str, arguments: list[str] | None) -> int:
    """The exit code: 0, what the command chose, 2 for wrong arguments, 130 when interrupted.

    `extra` of our package installs what the program needs: 1 when it is not there. `arguments` None
    means those of the process. A listing whose reader went away ends quietly with 0. Raises what
    the command raises.
    """
    stdout = sys.stdout
    if stdout is None:  # it was closed before the start
        return _run(app, name, extra, arguments)
    sys.stdout = cast(TextIO, _Output(stdout))
    try:
        code = _run(app, name, extra, arguments)
        sys.stdout.flush()
    except CannotPrint as error:
        if isinstance(error.__cause__, BrokenPipeError):
            return 0
        complain(
            f"{name}: Standard output cannot be written ({error.__cause__}). Expected a file with "
            "room, a pipe or a terminal. What the command did before that is done."
        )
        return CANNOT_PRINT
    finally:
        sys.stdout = _rest_of(stdout)
    return code


def complain(line: str) -> None:
    """Print an error's line on stderr. Where that cannot be written, the exit code says it."""
    try:
        print(line, file=sys.stderr)
    except OSError:
        sys.stderr = io.StringIO()


def _rest_of(stdout: TextIO) -> TextIO:
    """Stdout; in its place one that drops all, when what it still holds cannot be written.

    Python would try that again at its end, and complain.
    """
    try:
        stdout.flush()
    except OSError:
        return io.StringIO()
    return stdout


def _run(app: typer.Typer, name: str, extra: str, arguments: list[str] | None) -> int:
    try:
        return app(args=arguments, prog_name=name, standalone_mode=False) or 0
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else name
        text = " ".join(error.format_message().split())
        end = "" if text.endswith((".", "?")) else "."
        complain(f"{name}: {text}{end} See `{path} --help`.")
        return error.exit_code
    except ModuleNotFoundError as error:
        complain(
            f"{name}: The package {error.name!r} is not installed. Expected what "
            f"`pip install 'lorikeet-federated[{extra}]'` installs."
        )
        return 1
