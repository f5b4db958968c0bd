"""Log lines of ours, in our processes and in vLLM's."""

from __future__ import annotations

import io
import json
import logging
import logging.config
from collections.abc import Iterator

import pytest

from edge_node.logs import log_beside_vllm
from lorikeet.logs import FieldFormatter


@pytest.fixture
def ours() -> Iterator[logging.Logger]:
    """The logger as a fresh process has it; afterwards as it was."""
    logger = logging.getLogger("edge_node")
    disabled = {
        name: known.disabled
        for name, known in logging.root.manager.loggerDict.items()
        if isinstance(known, logging.Logger)
    }
    before = logger.handlers, logger.propagate, logger.level, logger.disabled
    logger.handlers, logger.propagate = [], True
    yield logger
    logger.handlers, logger.propagate, level, logger.disabled = before
    logger.setLevel(level)
    for name, was in disabled.items():  # an operator's configuration turns off every logger
        logging.getLogger(name).disabled = was
    logging.getLogger("edge_node.some.room").disabled = False


def said(logger: logging.Logger) -> io.StringIO:
    [handler] = logger.handlers
    assert isinstance(handler, logging.StreamHandler)
    text = io.StringIO()
    handler.setStream(text)
    return text


def test_fields_follow_the_text_and_keep_to_the_line() -> None:
    record = logging.makeLogRecord({"msg": "trouble", "name": "edge_node", "levelname": "WARNING"})
    record.__dict__ |= {
        "room": "capture",
        "cause": "disk full\nreally",
        "vllm_process_name": "APIServer",
        "empty": "",
    }
    line = FieldFormatter().format(record)
    assert line.endswith(
        "WARNING edge_node: trouble room=capture cause='disk full\\nreally' empty=''"
    )


@pytest.mark.parametrize(
    "handlers", [[], ["json"]], ids=["VLLM_CONFIGURE_LOGGING=0", "VLLM_LOGGING_CONFIG_PATH"]
)
def test_our_lines_appear_whatever_vllms_logging_is(
    ours: logging.Logger, handlers: list[str]
) -> None:
    """An operator's configuration turns off the loggers that it does not name, ours too."""
    room = logging.getLogger("edge_node.some.room")
    log_beside_vllm()
    logging.config.dictConfig(
        {
            "version": 1,
            "formatters": {"json": {"format": "%(message)s"}},
            "handlers": {"json": {"class": "logging.NullHandler", "formatter": "json"}},
            "loggers": {"vllm": {"handlers": handlers, "propagate": False}},
        }
    )
    log_beside_vllm()
    text = said(ours)
    room.error("Active release not loaded", extra={"cause": "rank 9"})
    assert text.getvalue().endswith(
        "ERROR edge_node.some.room: Active release not loaded cause='rank 9'\n"
    )
    assert text.getvalue().count("Active release") == 1


def test_our_lines_beside_vllm_are_json_where_the_node_is_told_so(
    ours: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_LOGS__FORMAT", "json")
    log_beside_vllm()
    text = said(ours)
    logging.getLogger("edge_node.some.room").warning("trouble", extra={"room": "capture"})
    assert json.loads(text.getvalue())["room"] == "capture"
