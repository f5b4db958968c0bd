"""Our log lines inside vLLM's processes; they end in data_dir/logs/vllm.log.

In: log records with `extra` fields. Out: one line each on stderr.
Guarantees: a field is shown whatever vLLM's own logging looks like.
"""

from __future__ import annotations

import logging
import os

from lorikeet.logs import FieldFormatter, stderr_handler

OURS = "edge_node"
FORMAT = "EDGE_LOGS__FORMAT"
"""Read by itself: these processes log before they have settings, and also without any."""


def log_beside_vllm() -> None:
    """Our lines in a process of vLLM; repeats change nothing.

    vLLM's handlers are not used: their format leaves fields out, and an operator may turn them off
    or point them elsewhere (VLLM_CONFIGURE_LOGGING=0, VLLM_LOGGING_CONFIG_PATH). An operator's
    configuration also turns off every logger that it does not name. So this is called again when
    vLLM has read it.
    """
    ours = logging.getLogger(OURS)
    if not any(isinstance(handler.formatter, FieldFormatter) for handler in ours.handlers):
        form = os.environ.get(FORMAT, "").lower()
        ours.handlers = [stderr_handler("json" if form == "json" else "text")]
    ours.setLevel(logging.INFO)
    ours.propagate = False
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and (name == OURS or name.startswith(f"{OURS}.")):
            logger.disabled = False
