"""A stand-in for vLLM's routes, and a client of our middleware before it."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from edge_node.capture import SERVED, Generation
from edge_node.serving.asgi import Message
from edge_node.serving.completion import KEY_OF_REQUEST
from edge_node.serving.gateway import Gateway
from edge_node.serving.middleware import LorikeetMiddleware


class App:
    """Stands for vLLM: answers with the model it was asked for; `during` runs before the answer."""

    def __init__(self, *, stream: bool = False, status: int = 200) -> None:
        self.stream, self.status = stream, status
        self.requests: list[Any] = []
        self.headers: list[tuple[bytes, bytes]] = []
        self.during: Any = None

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        self.headers = scope["headers"]
        body = (await receive())["body"]
        try:
            request = json.loads(body)
        except ValueError:
            request = body
        self.requests.append(request)
        if self.during is not None:
            await self.during()
        if (served := SERVED.get()) is not None:
            served.generations.append(
                Generation(text_only=True, prompt_ids=[5, 6], answer_ids=[7, 2])
            )
        kind = b"text/event-stream; charset=utf-8" if self.stream else b"application/json"
        await send(
            {
                "type": "http.response.start",
                "status": self.status,
                "headers": [(b"content-type", kind)],
            }
        )
        model = request.get("model") if isinstance(request, dict) else None
        if self.stream:
            choices = [{"index": 0, "delta": {"content": "yes"}, "finish_reason": "stop"}]
            chunk = json.dumps({"id": "chatcmpl-1", "model": model, "choices": choices})
            for piece in (f"data: {chunk}\n\n", "data: [DONE]\n\n", ""):
                await send(
                    {"type": "http.response.body", "body": piece.encode(), "more_body": piece != ""}
                )
        else:
            choices = [{"index": 0, "message": {"content": "yes"}, "finish_reason": "stop"}]
            answer = json.dumps({"id": "chatcmpl-1", "model": model, "choices": choices}).encode()
            await send({"type": "http.response.body", "body": answer})


class Client:
    def __init__(self, app: App, gateway: Gateway, *, of_the_node: bool = False) -> None:
        self._middleware = LorikeetMiddleware(app, gateway, of_the_node=of_the_node)
        self._gateway = gateway
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.pieces: list[bytes] = []
        self.on_disk_at_piece: list[bool] = []

    async def request(
        self,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        headers: Any = (),
        key: Any = None,
    ) -> Any:
        """`key`: the access key that it comes with."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        messages = [
            {"type": "http.request", "body": raw[:5], "more_body": True},
            {"type": "http.request", "body": raw[5:], "more_body": False},
        ]

        async def receive() -> Message:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                assert not self.status, "a second response"
                self.status, self.headers = message["status"], dict(message["headers"])
            else:
                with sqlite3.connect(self._gateway.settings.data_dir / "experience.db") as db:
                    self.on_disk_at_piece.append(
                        bool(db.execute("SELECT COUNT(*) FROM interactions").fetchone()[0])
                    )
                self.pieces.append(message["body"])

        scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
        scope[KEY_OF_REQUEST] = key
        await self._middleware(scope, receive, send)
        text = b"".join(self.pieces)
        return json.loads(text) if text.startswith(b"{") else text
