"""Log lines: constant text, then the record's fields, as `key=value` or as JSON.

In: log records with `extra` fields. Out: one line each on stderr.
Guarantees: a field never breaks a line; each line of JSON is one object.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]
_NO_FIELDS = frozenset({"message", "asctime", "taskName", "fileinfo", "vllm_process_name"})
"""What formatters, later Pythons and vLLM add to a record."""
_STANDARD = _NO_FIELDS | vars(logging.makeLogRecord({})).keys()


class FieldFormatter(logging.Formatter):
    """Appends the fields; a value with spaces or line ends is quoted."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        fields = _fields(record).items()
        return text + "".join(f" {key}={_quoted(str(value))}" for key, value in fields)


class JsonFormatter(FieldFormatter):
    """An object: time (RFC 3339, UTC), level, logger, message, the fields, perhaps exception."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        document: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = _fields(record).items()
        document |= {key: value for key, value in fields if key not in document}
        if record.exc_info and record.exc_info[0] is not None:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)


def log_to_stderr(form: LogFormat = "text") -> None:
    """Set up logging for the whole process; repeats change nothing but the form."""
    root = logging.getLogger()
    ours = [one for one in root.handlers if isinstance(one.formatter, FieldFormatter)]
    for handler in ours:
        handler.setFormatter(_formatter(form))
    if not ours:
        logging.basicConfig(level=logging.INFO, handlers=[stderr_handler(form)])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for every request


def stderr_handler(form: LogFormat = "text") -> logging.Handler:
    """A handler that writes our lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(form))
    return handler


def _formatter(form: LogFormat) -> logging.Formatter:
    return JsonFormatter() if form == "json" else FieldFormatter()


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _quoted(value: str) -> str:
    plain = value.isprintable() and not any(character.isspace() for character in value)
    return value if value and plain else repr(value)
