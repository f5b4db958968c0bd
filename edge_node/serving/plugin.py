"""The endpoint plug-in that vLLM loads into its API server (entry point `vllm.endpoint_plugins: lorikeet`).

In: vLLM's app and engine. Out: the routes /ready, /v1/models and /v1/feedback, the control socket, and the Gateway that
the middleware uses. Guarantees: with another vLLM than 0.32.* the server ends at start with a clear error.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from edge_node.errors import ServingError, StorageError, UnknownInteraction
from edge_node.serving.client import CONTROL_SOCKET_VARIABLE
from edge_node.serving.control import ControlServer
from edge_node.serving.feedback import read_feedback
from edge_node.serving.gateway import Gateway
from edge_node.serving.internals import Engine, check_contract
from edge_node.settings import load_settings

logger = logging.getLogger(__name__)

gateway: Gateway | None = None
"""Of this process; None until vLLM has called init_state."""


class LorikeetPlugin:
    """Satisfies vllm.plugins.endpoint_plugins.interface.EndpointPlugin."""

    name = "lorikeet"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route("/ready", _ready, methods=["GET"])
        app.add_api_route("/v1/models", _models, methods=["GET"])
        app.add_api_route("/v1/feedback", _feedback, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Raises ServingError (and with it ends vLLM) when the contract or the control socket does not hold."""
        global gateway
        check_contract()
        socket = os.environ.get(CONTROL_SOCKET_VARIABLE)
        if not socket:
            raise ServingError(f"{CONTROL_SOCKET_VARIABLE} is not set; expected the path of the control socket.")
        settings, engine = load_settings(), Engine(engine_client, state, args)
        try:
            engine.chat_format.write(settings.data_dir)  # for the learner, which renders anchors
        except OSError as error:  # a full disk must not keep a node from serving
            logger.error("Chat format not written", extra={"cause": str(error)})
        started = Gateway(settings, engine)
        await started.activate()
        state.lorikeet_control = ControlServer(started, Path(socket))
        await state.lorikeet_control.start()
        gateway = started


async def _ready() -> JSONResponse:
    reason = _gateway().not_ready()
    if reason is None:
        return JSONResponse({"ready": True, "model": _gateway().aliases.target})
    return JSONResponse({"ready": False, "reason": reason}, status_code=503, headers={"retry-after": "5"})


async def _models() -> JSONResponse:
    """The base, the alias (root: the version it points at) and every loaded version; no path of this host."""
    engine, aliases = _gateway().engine, _gateway().aliases
    roots = {aliases.base: aliases.base}
    if aliases.target is not None:
        roots[aliases.alias] = aliases.target
    roots |= {name: name for name in aliases.loaded}
    created = int(time.time())
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {
                    "id": name, "object": "model", "created": created, "owned_by": "lorikeet", "root": root,
                    "parent": None if name == aliases.base else aliases.base, "max_model_len": engine.max_model_len,
                }
                for name, root in roots.items()
            ],
        }
    )  # fmt: skip


async def _feedback(request: Request) -> JSONResponse:
    try:
        feedback = read_feedback(await request.body())
        receipt = await asyncio.to_thread(_gateway().keep_feedback, feedback)
    except UnknownInteraction as error:
        return _error(404, "NotFoundError", str(error), "id")
    except ValueError as error:
        return _error(400, "BadRequestError", str(error))
    except StorageError as error:
        logger.error("Feedback not stored", extra={"cause": str(error)})
        return _error(503, "ServiceUnavailableError", "Feedback could not be stored; send it again later.")
    answer = {"id": receipt.id, "interaction": feedback.interaction_id, "usable": not receipt.unusable}
    return JSONResponse(answer | ({"reason": receipt.unusable} if receipt.unusable else {}))


def _gateway() -> Gateway:
    if gateway is None:
        raise ServingError("The plug-in was asked before vLLM had initialised it.")
    return gateway


def _error(status: int, kind: str, message: str, param: str | None = None) -> JSONResponse:
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": param, "code": status}}, status_code=status
    )
