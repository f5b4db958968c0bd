"""A real central tells a real HTTP receiver, is killed, and tells what it had not told."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from central.errors import SettingsError
from central.webhooks.messages import Message
from central.webhooks.sending import send
from examples.ports import free_port
from protos.operators.v1 import operators_pb2
from tests.contract import central_harness as harness
from tests.contract.central_process import outside, process, ready

KEY = os.urandom(32)
SECRET = "whsec_" + base64.b64encode(KEY).decode()


class Receiver:
    """Answers with `status`; keeps what it was told, once the signature is right."""

    def __init__(self, port: int) -> None:
        self.status = 200
        self.got: list[dict[str, Any]] = []
        self.ids: list[str] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                expect_signed(self.headers, body)
                self.send_response(receiver.status)
                if receiver.status == 302:
                    self.send_header("location", self.path)
                self.end_headers()
                if receiver.status == 200:
                    receiver.ids.append(self.headers["webhook-id"])
                    receiver.got.append(json.loads(body))

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def expect_signed(sent: Any, body: bytes) -> None:
    """As a receiver does it."""
    assert abs(time.time() - int(sent["webhook-timestamp"])) < 60
    signed = f"{sent['webhook-id']}.{sent['webhook-timestamp']}.".encode() + body
    right = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert sent["webhook-signature"] == f"v1,{right}"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver(free_port())
    yield receiver
    receiver.close()


def address(receiver: Receiver) -> str:
    return f"http://127.0.0.1:{receiver.server.server_address[1]}/hook?token=s3cret"


@pytest.mark.parametrize("status", [302, 400, 500])
def test_only_a_2xx_is_a_yes(receiver: Receiver, status: int) -> None:
    receiver.status = status
    message = Message("event-1", b"{}")
    assert send(address(receiver), message, KEY) == f"it answered with HTTP {status}"
    receiver.status = 200
    assert send(address(receiver), message, KEY) is None


def test_nobody_there() -> None:
    why = send(f"http://127.0.0.1:{free_port()}/s3cret", Message("event-1", b"{}"), KEY)
    assert why == "Connection refused"


async def test_a_killed_central_tells_what_it_had_not_told(tmp_path: Path) -> None:
    settings = harness.make_settings(tmp_path)
    secret_file, port = tmp_path / "secret", free_port()
    secret_file.write_text(SECRET)
    variables = {
        "WEBHOOKS__URLS": f'["http://127.0.0.1:{port}/hook?token=s3cret"]',
        "WEBHOOKS__SECRET_FILE": str(secret_file),
    }
    async with process(settings, "serve", **variables) as first:
        await ready(first)
        async with outside(settings) as central:
            node = await central.enroll("site-a", await central.token())
            await central.operators.QuarantineNode(
                operators_pb2.QuarantineNodeRequest(node_id=node.node_id, reason="tests")
            )
        first.kill()
        log = (await first.communicate())[1].decode()
    assert "s3cret" not in log
    assert SECRET not in log
    receiver = Receiver(port)
    try:
        async with process(settings, "serve", **variables) as second:
            await ready(second)
            async with asyncio.timeout(30):
                while not receiver.got:
                    await asyncio.sleep(0.05)
        [told] = receiver.got
        assert told["type"] == "problem.node_quarantined"
        assert told["data"]["subject"] == node.node_id
    finally:
        receiver.close()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WEBHOOKS__URLS": '["http://example.org/s3cret"]'}, "expected https"),
        ({"WEBHOOKS__URLS": '["https://example.org/s3cret"]'}, "CENTRAL_WEBHOOKS__SECRET_FILE is"),
        (
            {
                "WEBHOOKS__URLS": '["https://example.org/s3cret"]',
                "WEBHOOKS__SECRET_FILE": "/nowhere",
            },
            "cannot be read: No such file",
        ),
    ],
)
async def test_what_cannot_work_is_refused_at_start(
    tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    settings = harness.make_settings(tmp_path)
    async with process(settings, "serve", **variables) as running:
        _, errors = await asyncio.wait_for(running.communicate(), 60)
    assert running.returncode == SettingsError.exit_code
    assert said in errors.decode()
    assert "s3cret" not in errors.decode()
