"""Why a vLLM did not start, from what it printed.

In: the text of logs/vllm.log. Out: one line, the exception or the argument mistake that ended it,
or nothing. Guarantees: a warning is never the reason, however many errors it names. A traceback
with the cause wins over those that only say that another process failed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_REASON = 400
_PREFIX = re.compile(
    r"^(?:\(\S+ pid=\d+\) )?"
    r"(?:\S+ )?(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL):?\s+"
    r"(?:\d\d-\d\d \d\d:\d\d:\d\d \[\S+?:\d+\] ?)?"
)
"""`(EngineCore pid=7) ERROR 11-26 19:12:43 [core.py:1510] ` of vLLM, or `ERROR:    ` of uvicorn."""
_PROCESS = re.compile(r"^\(\S+ pid=\d+\) ")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_GROUP = re.compile(r"^ +(?:\| |\+-+ ?|\+ )")
_TRACEBACK = "Traceback (most recent call last):"
_EXCEPTION = re.compile(r"^(?P<kind>[A-Za-z_][\w.]*)(?:: ?(?P<words>.*))?$")
_ARGUMENT = re.compile(r"^[\w./-]+: error: (?P<words>.+)$")
_NATIVE = re.compile(r"^(terminate called after|Fatal Python error: |Out of memory)")
_FRAME = re.compile(r'^\s+File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)$')
_NOISE = ("CancelledError", "KeyboardInterrupt", "SystemExit", "BrokenPipeError")
"""What ends a process that another failure stops."""
_ECHOES = ("See root cause above", "See stack trace for root cause")


@dataclass(frozen=True)
class _Raised:
    kind: str
    words: str
    where: str

    def __str__(self) -> str:
        words = f"{self.kind}: {self.words}" if self.words else self.kind
        return words if len(self.words) > 60 else f"{words} ({self.where})"

    @property
    def is_echo(self) -> bool:
        """Says only that another process failed. News: its exit code, `{'EngineCore': -9}`."""
        echo = any(text in self.words for text in _ECHOES) and "': -" not in self.words
        return echo or self.kind in _NOISE


def startup_reason(text: str) -> str:
    """The reason in at most MAX_REASON characters; empty when the text names none."""
    plain = [(_level(line), _bare(line)) for line in _lines(text)]
    said = [line for level, line in plain if level not in ("DEBUG", "INFO", "WARNING")]
    raised = _tracebacks(said)
    causes = [one for one in raised if not one.is_echo]
    mistakes = [mistake["words"] for line in said if (mistake := _ARGUMENT.match(line))]
    native = [line for line in said if _NATIVE.match(line)]
    errors = [line for level, line in plain if level in ("ERROR", "CRITICAL") and line.strip()]
    last = _last_word(plain)
    if last and _ARGUMENT.match(
        last[0]
    ):  # argparse ends the process, whatever was caught and printed before
        causes = []
    for known in (native, causes, mistakes, raised, errors, last):
        if known:
            return " ".join(str(known[-1]).split())[:MAX_REASON]
    return ""


def raised_at(text: str) -> str:
    """Kind and place of the last exception, without its words, which may quote a request.

    Empty when there is none.
    """
    raised = _tracebacks([_bare(line) for line in _lines(text)])
    causes = [one for one in raised if not one.is_echo] or raised
    return f"{causes[-1].kind} ({causes[-1].where})" if causes else ""


def _lines(text: str) -> list[str]:
    """Without colours, and without the frame that Python draws around a group of exceptions."""
    return [_GROUP.sub("", _COLOUR.sub("", line.rstrip("\r"))) for line in text.split("\n")]


def _level(line: str) -> str:
    found = _PREFIX.match(line)
    return found["level"] if found else ""


def _bare(line: str) -> str:
    return _PROCESS.sub("", _PREFIX.sub("", line, count=1))


def _last_word(plain: list[tuple[str, str]]) -> list[str]:
    """What a process said at its very end, without a level: `python: No module named vllm`."""
    level, line = next(
        ((level, line) for level, line in reversed(plain) if line.strip()), ("INFO", "")
    )
    return [] if level or line.startswith(" ") or _is_chatter(line) else [line]


def _is_chatter(line: str) -> bool:
    return "it/s]" in line or "Warning:" in line


def _tracebacks(lines: list[str]) -> list[_Raised]:
    """One for each traceback, in the text's order; destructors' tracebacks are left out."""
    found = []
    for start, line in enumerate(lines):
        if line.strip() == _TRACEBACK and not lines[max(0, start - 1)].startswith(
            "Exception ignored in"
        ):
            raised = _raised(lines[start + 1 :])
            if raised is not None:
                found.append(raised)
    return found


def _raised(lines: list[str]) -> _Raised | None:
    where = ""
    for index, line in enumerate(lines):
        if frame := _FRAME.match(line):
            where = f"{frame['file'].rpartition('/')[2]}:{frame['line']}"
        elif line.strip() and not line.startswith(" "):
            exception = _EXCEPTION.match(line)
            if exception is None:
                return None
            kind = exception["kind"].rpartition(".")[2]
            return _Raised(kind, _words(exception["words"] or "", lines[index + 1 :]), where)
    return None


def _words(first: str, rest: list[str]) -> str:
    """An exception's message, which may go on over indented lines.

    pydantic's begins with a count; a line names a field, indented ones say what is wrong.
    """
    counted = re.match(r"\d+ validation errors? for ", first) is not None
    words = [] if counted else [first]
    for line in rest[:12]:
        goes_on = line.startswith((" ", "(")) or (counted and re.fullmatch(r"[\w.]+", line))
        if _is_chatter(line) or not goes_on:
            break
        if "For further information visit" not in line:
            words.append(
                re.sub(r" \[type=\w+, input_value=.*", "", line.strip()).removeprefix(
                    "Value error, "
                )
            )
    return " ".join(word for word in words if word)
