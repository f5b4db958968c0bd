"""Log lines: constant text, then the record's fields as `key=value`.

In: log records with `extra` fields. Out: one line each on stderr.
Guarantees: a field never breaks a line.
"""

from __future__ import annotations

import logging
import sys

_NO_FIELDS = frozenset({"message", "asctime", "taskName", "fileinfo", "vllm_process_name"})
"""What formatters, later Pythons and vLLM add to a record."""


class FieldFormatter(logging.Formatter):
    """Appends the fields; a value with spaces or line ends is quoted."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        standard = _NO_FIELDS | vars(logging.makeLogRecord({})).keys()
        fields = {key: value for key, value in vars(record).items() if key not in standard}
        text = super().formatMessage(record)
        return text + "".join(f" {key}={_quoted(str(value))}" for key, value in fields.items())


def log_to_stderr() -> None:
    """Set up logging for the whole process; repeats change nothing."""
    logging.basicConfig(level=logging.INFO, handlers=[stderr_handler()])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for every request


def stderr_handler() -> logging.Handler:
    """A handler that writes our lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FieldFormatter())
    return handler


def _quoted(value: str) -> str:
    plain = value.isprintable() and not any(character.isspace() for character in value)
    return value if value and plain else repr(value)
