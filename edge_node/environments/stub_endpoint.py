"""An OpenAI-compatible endpoint without a model, to try an agent with.

In: requests for chats and completions. Out: one fixed text, whole or as a stream. Guarantees: it
listens on loopback, at a port that the kernel chooses, inside a `with`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


@contextmanager
def stub_endpoint(text: str) -> Iterator[str]:
    """The `base_url` of an endpoint that answers `text`."""

    class Answering(_Handler):
        answer = text

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    answer = ""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
        chat = self.path.endswith("/chat/completions")
        streamed = bool(request.get("stream"))
        document = {
            "id": "stub",
            "object": ("chat.completion" if chat else "text_completion") + ".chunk" * streamed,
            "created": 0,
            "model": request.get("model"),
            "choices": [self._choice(chat, streamed)],
            "usage": USAGE,
        }
        body = json.dumps(document).encode()
        if streamed:
            body = b"data: " + body + b"\n\ndata: [DONE]\n\n"
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if streamed else "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _choice(self, chat: bool, streamed: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
        if not chat:
            return choice | {"text": self.answer}
        message = {"role": "assistant", "content": self.answer}
        return choice | {"delta" if streamed else "message": message}

    def log_message(self, format: str, *args: Any) -> None:
        """A request may be a prompt."""
