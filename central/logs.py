"""Log lines of central: constant text, then the record's fields as `key=value`.

In: log records with `extra` fields. Out: one line each on stderr.
"""

from __future__ import annotations

import logging
import os
import sys

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class FieldFormatter(logging.Formatter):
    """Appends the fields; a value with spaces is quoted."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        text = super().formatMessage(record)
        return text + "".join(f" {key}={_quoted(str(value))}" for key, value in fields.items())


def log_to_stderr() -> None:
    """Set up logging for the whole process, before gRPC is loaded; repeats change nothing."""
    # gRPC's own log has a line for every failed TLS handshake, and whoever reaches the port can make thousands a second.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FieldFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _quoted(value: str) -> str:
    return repr(value) if not value or any(character.isspace() for character in value) else value
