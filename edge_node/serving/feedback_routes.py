"""POST, GET and DELETE of /v1/feedback, and the description of the node's own routes.

In: HTTP requests that access.py lets in. Out: JSON, errors in OpenAI's form. Guarantees: what is
acknowledged is on disk; a key with a user reaches its own feedback only, and is told nothing of
other people's.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable
from reprlib import repr  # the value seen, cut short
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from edge_node.errors import (
    FeedbackWithdrawn,
    KeyReused,
    StorageError,
    UnknownEpisode,
    UnknownFeedback,
    UnknownInteraction,
)
from edge_node.experience import EpisodeFeedback, Receipt, Said, Teller, Told, interactions_of
from edge_node.serving.asgi import RETRY_AFTER_S
from edge_node.serving.completion import KEY_OF_REQUEST, user_of
from edge_node.serving.feedback import read_feedback
from edge_node.serving.gateway import Gateway
from edge_node.serving.openapi import openapi

CHECK_STORE = (
    "Check the disk of EDGE_DATA_DIR: its space, permissions and experience.db. "
    "Clients may send it again."
)
IDEMPOTENCY_HEADER = "idempotency-key"
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class FeedbackRoutes:
    """The handlers; `gateway` gives the serving process's own."""

    def __init__(self, gateway: Callable[[], Gateway]) -> None:
        self._gateway = gateway

    def attach(self, app: FastAPI) -> None:
        """Adds the routes."""
        one = "/v1/feedback/{feedback_id}"
        app.add_api_route("/v1/feedback", self.post, methods=["POST"])
        app.add_api_route(one, self.get, methods=["GET"])
        app.add_api_route(one, self.delete, methods=["DELETE"])
        app.add_api_route("/v1/openapi.json", self._describe, methods=["GET"])

    async def post(self, request: Request) -> JSONResponse:
        try:
            said = read_feedback(await request.body())
            teller = _teller(request, said)
        except ValueError as error:
            return _error(400, "BadRequestError", str(error))
        return await self._answer(lambda: _receipt(said, self._keep(said, teller)))

    async def get(self, request: Request, feedback_id: str) -> JSONResponse:
        user = user_of(request.scope)
        return await self._answer(
            lambda: JSONResponse(_told(self._gateway().store.feedback(feedback_id, user)))
        )

    async def delete(self, request: Request, feedback_id: str) -> JSONResponse:
        user = user_of(request.scope)

        def withdraw() -> JSONResponse:
            at = self._gateway().store.withdraw(feedback_id, user)
            return JSONResponse({"id": feedback_id, "deleted": True, "deleted_at": at})

        return await self._answer(withdraw)

    async def _describe(self) -> JSONResponse:
        return JSONResponse(openapi())

    def _keep(self, said: Said, teller: Teller) -> Receipt:
        receipt = self._gateway().keep_feedback(said, teller)
        self._gateway().problems.clear("feedback")
        return receipt

    async def _answer(self, work: Callable[[], JSONResponse]) -> JSONResponse:
        """What `work` answers, in a thread: the disk may be slow."""
        try:
            return await asyncio.to_thread(work)
        except UnknownEpisode as error:
            return _error(404, "NotFoundError", str(error), "episode")
        except UnknownInteraction as error:
            return _error(404, "NotFoundError", str(error), "id")
        except FeedbackWithdrawn as error:
            return _error(410, "GoneError", str(error), "id")
        except UnknownFeedback as error:
            return _error(404, "NotFoundError", str(error), "id")
        except KeyReused as error:
            return _error(422, "UnprocessableEntityError", str(error), "Idempotency-Key")
        except ValueError as error:
            return _error(400, "BadRequestError", str(error))
        except StorageError as error:
            await asyncio.to_thread(
                self._gateway().problems.report,
                "feedback",
                f"Feedback is refused with 503: {error}",
                CHECK_STORE,
            )
            text = "Feedback could not be stored; send it again later."
            return _error(503, "ServiceUnavailableError", text)


def _teller(request: Request, said: Said) -> Teller:
    """Who says it. Raises ValueError for an idempotency key that cannot be one."""
    key = request.scope.get(KEY_OF_REQUEST)
    once = request.headers.get(IDEMPOTENCY_HEADER)
    if once is not None and IDEMPOTENCY_KEY.fullmatch(once) is None:
        raise ValueError(
            f"The header Idempotency-Key is {repr(once)}; expected 1 to 255 printable ASCII "
            "characters without spaces."
        )
    # Of what was read: the same words in another order or layout are the same body.
    digest = hashlib.sha256(f"{type(said).__name__} {said}".encode()).hexdigest()
    return Teller(user_of(request.scope), key.name if key else "", once, digest if once else "")


def _receipt(said: Said, receipt: Receipt) -> JSONResponse:
    answer: dict[str, Any] = {"id": receipt.id or None}
    if isinstance(said, EpisodeFeedback):
        answer |= {"episode": said.episode, "answers": receipt.answers}
    else:
        answer["interaction"] = interactions_of(said)[0]
    if receipt.waits:
        return JSONResponse(answer | {"usable": None, "waiting": True}, status_code=202)
    answer["usable"] = not receipt.unusable
    return JSONResponse(answer | ({"reason": receipt.unusable} if receipt.unusable else {}))


def _told(told: Told) -> dict[str, Any]:
    """Feedback as it is read back: nothing that was not said, and what became of it."""
    answer: dict[str, Any] = {"id": told.id, "created_at": told.created_at, "kind": told.kind}
    if told.episode is not None:
        answer |= {"episode": told.episode, "answers": len(told.interactions)}
    else:
        answer["interaction"] = told.interactions[0]
    for name in ("chosen", "rejected"):
        if name in told.said:
            answer[name] = dict(zip(("id", "choice"), told.said[name], strict=True))
    if "scores" in told.said:
        answer["scores"] = list(told.said["scores"])
    if told.kind == "thumb":
        answer["thumb"] = "up" if told.score else "down"
    elif told.score is not None:
        answer["score"] = told.score
    if told.kind == "tool_calls":
        answer["tool_calls"] = json.loads(told.correction or "[]")
    elif told.correction is not None:
        answer["correction"] = told.correction
    if told.comment is not None:
        answer["comment"] = told.comment
    if told.waits:
        return answer | {"usable": None, "waiting": True} | _reason(told.refused)
    return answer | {"usable": not told.unusable} | _reason(told.unusable)


def _reason(text: str) -> dict[str, str]:
    return {"reason": text} if text else {}


def _error(status: int, kind: str, message: str, param: str | None = None) -> JSONResponse:
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": param, "code": status}},
        status_code=status,
        headers={"retry-after": str(RETRY_AFTER_S)} if status == 503 else None,
    )
