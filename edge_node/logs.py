"""Log lines of the node's processes: constant text, then the record's fields as `key=value`.

In: log records with `extra` fields. Out: one line each on stderr, which is data_dir/logs/vllm.log in vLLM's processes.
Guarantees: a field is shown whatever vLLM's own logging looks like, and never breaks a line.
"""

from __future__ import annotations

import logging
import sys

_NO_FIELDS = frozenset({"message", "asctime", "taskName", "fileinfo", "vllm_process_name"})
"""What formatters, later Pythons and vLLM add to a record."""
OURS = "edge_node"


class FieldFormatter(logging.Formatter):
    """Appends the fields; a value with spaces or line ends is quoted."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        standard = _NO_FIELDS | vars(logging.makeLogRecord({})).keys()
        fields = {key: value for key, value in vars(record).items() if key not in standard}
        return super().formatMessage(record) + "".join(f" {key}={_quoted(str(value))}" for key, value in fields.items())


def log_to_stderr() -> None:
    """Set up logging for a process of ours; repeats change nothing."""
    logging.basicConfig(level=logging.INFO, handlers=[_handler()])
    logging.getLogger("httpx").setLevel(logging.WARNING)


def log_beside_vllm() -> None:
    """Our lines in a process of vLLM; repeats change nothing.

    vLLM's handlers are not used: their format leaves fields out, and an operator may turn them off or point them
    elsewhere (VLLM_CONFIGURE_LOGGING=0, VLLM_LOGGING_CONFIG_PATH). An operator's configuration also turns off every
    logger that exists and that it does not name. So this is called again once vLLM has read it.
    """
    ours = logging.getLogger(OURS)
    if not any(isinstance(handler.formatter, FieldFormatter) for handler in ours.handlers):
        ours.handlers = [_handler()]
    ours.setLevel(logging.INFO)
    ours.propagate = False
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and (name == OURS or name.startswith(f"{OURS}.")):
            logger.disabled = False


def _handler() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FieldFormatter())
    return handler


def _quoted(value: str) -> str:
    plain = value.isprintable() and not any(character.isspace() for character in value)
    return value if value and plain else repr(value)
