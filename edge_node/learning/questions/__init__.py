"""Questions from which anchors are made: files of JSON lines in, questions out.

`open.jsonl` and `qa.jsonl` are those of the package: short, plain, and in no data set.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_node.errors import EdgeError

OPEN_FILE = Path(__file__).with_name("open.jsonl")
QA_FILE = Path(__file__).with_name("qa.jsonl")


class OpenQuestion(BaseModel):
    """A question with many good answers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    question: str = Field(min_length=1)


class Question(OpenQuestion):
    """A question whose right answers are known."""

    answers: list[str] = Field(min_length=1)

    def is_right(self, answer: str) -> bool:
        """Whether `answer` contains one of `answers` as words; upper and lower case are equal."""
        return any(
            re.search(rf"(?<!\w){re.escape(known)}(?!\w)", answer, re.IGNORECASE)
            for known in self.answers
        )


Q = TypeVar("Q", bound=OpenQuestion)


def read_open(file: Path) -> list[OpenQuestion]:
    """The questions of a file with `{"question": ...}` a line; raises EdgeError."""
    return _read(file, OpenQuestion, '{"question": "..."}')


def read_qa(file: Path) -> list[Question]:
    """The questions of a file with `{"question": ..., "answers": [...]}` a line.

    Raises EdgeError.
    """
    return _read(file, Question, '{"question": "...", "answers": ["..."]}')


def _read(file: Path, kind: type[Q], form: str) -> list[Q]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeError(
            f"{file} cannot be read: {error}. Expected a text file in UTF-8 with {form} on each "
            "line."
        ) from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(kind.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise EdgeError(
                f"{file}, line {number}: {f'{where}: ' if where else ''}{first['msg']}. Expected "
                f"{form}. Correct the line."
            ) from error
    return found
