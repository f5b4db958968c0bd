"""The plug-in that vLLM loads into its API server (`vllm.endpoint_plugins: lorikeet`).

In: vLLM's app and engine. Out: the routes /ready, /v1/models and /v1/feedback, the control socket,
and the Gateway that the middleware uses. Guarantees: with another vLLM than 0.32.* the server ends
at start with a clear error.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from edge_node.errors import ServingError
from edge_node.logs import log_beside_vllm
from edge_node.serving import gateway as gateways
from edge_node.serving import metrics
from edge_node.serving.certificate import watch_certificates
from edge_node.serving.client import CONTROL_SOCKET_VARIABLE
from edge_node.serving.control import ControlServer
from edge_node.serving.feedback_routes import FeedbackRoutes
from edge_node.serving.fingerprint import name_weights
from edge_node.serving.gateway import Gateway
from edge_node.serving.internals import Engine, check_contract
from edge_node.serving.metrics_port import MetricsPort
from edge_node.serving.middleware import LorikeetMiddleware
from edge_node.serving.session_port import SessionPort
from edge_node.settings import load_settings
from edge_node.tracing import start_traces
from protos.base import read_base_model

logger = logging.getLogger(__name__)

TALKATIVE = "vllm.entrypoints.anthropic"
"""It writes errors with their stack into vLLM's log, and these may quote a prompt."""


class LorikeetPlugin:
    """Satisfies vllm.plugins.endpoint_plugins.interface.EndpointPlugin."""

    name = "lorikeet"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        self._app = app
        app.add_api_route("/ready", _ready, methods=["GET"])
        app.add_api_route("/v1/models", _models, methods=["GET"])
        FeedbackRoutes(_gateway).attach(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Raises ServingError, which ends vLLM, when its surface, or a socket of ours, fails."""
        log_beside_vllm()  # again: vLLM has read an operator's own logging configuration since
        check_contract()
        logging.getLogger(TALKATIVE).setLevel(logging.CRITICAL)
        socket = os.environ.get(CONTROL_SOCKET_VARIABLE)
        if not socket:
            raise ServingError(
                f"{CONTROL_SOCKET_VARIABLE} is not set; expected the path of the control socket."
            )
        name_weights()
        settings, engine = load_settings(), Engine(engine_client, state, args)
        start_traces(settings, "gateway")
        started = Gateway(settings, engine)
        await asyncio.to_thread(_name_base, started)
        try:
            engine.chat_format.write(settings.data_dir)  # for the learner, which renders anchors
            started.problems.clear("chat-format")
        except OSError as error:  # a full disk must not keep a node from serving
            started.problems.report(
                "chat-format",
                f"vLLM's chat format could not be written: {error}. Anchors are rendered with the "
                "one before.",
                "Check the disk of EDGE_DATA_DIR, then start the node again.",
            )
        await started.activate()
        bare = _without_middleware(self._app)
        requests = LorikeetMiddleware(bare, started, of_the_node=True)
        sessions = SessionPort(started, bare)
        state.lorikeet_control = ControlServer(started, Path(socket), requests, sessions)
        await state.lorikeet_control.start()
        state.lorikeet_metrics = MetricsPort(settings.serving)
        await state.lorikeet_metrics.start()
        watch_certificates()
        started.keys.watch()
        metrics.register(started)
        gateways.here = started


def _name_base(started: Gateway) -> None:
    """The base's digest names its answers; ServingError when its files are not those any more."""
    path, name = started.settings.base.path, started.engine.base_name
    if path is None:
        return
    digest = read_base_model(path, memory=started.settings.data_dir).digest
    if name != f"base@{digest[:8]}":
        raise ServingError(
            f"The base model in {path} has digest {digest[:8]} now, and the node started with "
            f"{name}. Restore its files, or start the node again."
        )
    started.weights[name] = digest


def _without_middleware(app: FastAPI) -> FastAPI:
    """The same routes and state, without vLLM's authentication and an operator's middleware.

    The node's own requests take this way. It must be called when `app` is complete.
    """
    bare = copy.copy(app)
    bare.user_middleware, bare.middleware_stack = [], None
    return bare


async def _ready() -> JSONResponse:
    reason = _gateway().not_ready()
    if reason is None:
        return JSONResponse({"ready": True, "model": _gateway().aliases.target})
    return JSONResponse(
        {"ready": False, "reason": reason}, status_code=503, headers={"retry-after": "5"}
    )


async def _models() -> JSONResponse:
    """The base, the alias (root: its version) and each loaded version; no path of this host.

    The learner's policies are nobody else's.
    """
    engine, aliases = _gateway().engine, _gateway().aliases
    roots = {aliases.base: aliases.base}
    if aliases.target is not None:
        roots[aliases.alias] = aliases.target
    roots |= {name: name for name in aliases.public}
    created = int(time.time())
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {
                    "id": name, "object": "model", "created": created, "owned_by": "lorikeet",
                    "root": root, "parent": None if name == aliases.base else aliases.base,
                    "max_model_len": engine.max_model_len,
                }
                for name, root in roots.items()
            ],
        }
    )  # fmt: skip


def _gateway() -> Gateway:
    if gateways.here is None:
        raise ServingError("The plug-in was asked before vLLM had initialised it.")
    return gateways.here
