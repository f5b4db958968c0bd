"""Log lines as JSON: one object each, whatever a field holds."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from lorikeet.logs import FieldFormatter, JsonFormatter, log_to_stderr


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger; afterwards as it was."""
    root = logging.getLogger()
    before, level = root.handlers, root.level
    yield root
    root.handlers = before
    root.setLevel(level)


def document(**fields: object) -> dict[str, object]:
    record = logging.makeLogRecord(
        {"msg": "trouble with %s", "args": ("it",), "name": "central.x", "levelname": "WARNING"}
    )
    record.__dict__.update(fields)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    return dict(json.loads(line))


def test_a_line_is_an_object_with_time_level_logger_message_and_fields() -> None:
    found = document(room="capture", cause="full\nreally", number=3, path=Path("/x"))
    assert datetime.fromisoformat(str(found.pop("time"))).tzinfo is not None
    assert found == {
        "level": "WARNING",
        "logger": "central.x",
        "message": "trouble with it",
        "room": "capture",
        "cause": "full\nreally",
        "number": 3,
        "path": "/x",
    }


def test_a_field_takes_no_standard_place() -> None:
    found = document(level="NONE", logger="mine", time="never")
    assert (found["level"], found["logger"]) == ("WARNING", "central.x")
    assert found["time"] != "never"


def test_an_exception_is_a_field() -> None:
    try:
        raise ValueError("seven")
    except ValueError:
        found = document(exc_info=sys.exc_info())
    assert "ValueError: seven" in str(found["exception"])


def test_the_form_can_be_chosen_later(root: logging.Logger) -> None:
    root.handlers = []  # as a fresh process has it
    log_to_stderr()
    log_to_stderr("json")
    [handler] = root.handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(text := io.StringIO())
    logging.getLogger("central.x").info("ready", extra={"cohort": "shared"})
    assert json.loads(text.getvalue())["cohort"] == "shared"
    log_to_stderr("text")
    assert type(handler.formatter) is FieldFormatter
    assert root.handlers == [handler]
