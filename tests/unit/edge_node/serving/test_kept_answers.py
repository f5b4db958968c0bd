"""Which answers are kept, what is taken out of them, and what feedback on the others says."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from edge_node.access import Key, Scope
from edge_node.capture import RecorderCounts
from edge_node.capture.choosing import REASONS
from edge_node.errors import UnknownEpisode, UnknownInteraction
from edge_node.experience import Answer, EpisodeFeedback, Feedback, Preference, Receipt
from edge_node.experience.usable import ABORTED, REDACTED, TOO_OLD
from edge_node.serving.asgi import Message
from edge_node.serving.gateway import Gateway
from tests.fakes.gateway import make_gateway, make_version
from tests.fakes.routes import App, Client

V1 = "lorikeet@v1-aaaaaaaa"
CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "hi"}]}
NOW = datetime.now(UTC)


@pytest.fixture
async def gateway(tmp_path: Path) -> Gateway:
    gateway = make_gateway(tmp_path)
    await gateway.load(V1, make_version(tmp_path, "v1"))
    gateway.point(V1)
    return gateway


@pytest.mark.parametrize(
    ("headers", "capture", "changed", "reason"),
    [
        ([(b"x-lorikeet-capture", b"off")], True, {}, "request"),
        ([], False, {}, "key"),
        ([], True, {"sample": 0.0}, "sample"),
        ([], True, {"enabled": False}, "node"),
    ],
)
async def test_feedback_on_an_answer_that_is_not_kept_says_why(
    gateway: Gateway, headers: Any, capture: bool, changed: dict[str, Any], reason: str
) -> None:
    settings = gateway.settings.capture.model_copy(update=changed)
    gateway.settings = gateway.settings.model_copy(update={"capture": settings})
    key = Key(name="k", sha256="0" * 64, scopes=(Scope.INFER,), created=NOW, capture=capture)
    app = App()
    await Client(app, gateway).request(CHAT, QUESTION, headers=headers, key=key)
    given = f"chatcmpl-{app.requests[0]['request_id']}"  # as vLLM makes it
    assert dict(app.headers)[b"x-request-id"].decode() in given, "of one or the other"
    assert gateway.keep_feedback(Feedback(given, 1.0)) == Receipt("", REASONS[reason])
    other = Preference(Answer(given), Answer("chatcmpl-1"))
    assert gateway.keep_feedback(other).unusable == REASONS[reason]
    counts = gateway.store.counts()
    assert (counts.interactions, counts.feedback) == (0, 0)


async def test_secrets_are_gone_before_anything_is_written(gateway: Gateway) -> None:
    secret = "bob@example.org"
    asked = {"messages": [{"role": "user", "content": f"hi {secret}"}]}
    await Client(App(), gateway).request(CHAT, asked)
    gateway.keep_feedback(Feedback("chatcmpl-1", None, f"say {secret}", f"not {secret}"))
    gateway.keep_feedback(Feedback("chatcmpl-1", 1.0, None, None))
    calls = [{"name": "mail", "arguments": {"to": f"\n{secret}"}}]
    said = gateway.redaction.said(
        Feedback("chatcmpl-1", None, json.dumps(calls), None, form="tool_calls")
    )
    assert isinstance(said, Feedback)
    assert json.loads(said.correction or "")[0]["arguments"] == {"to": "\n[EMAIL]"}
    assert said.redacted
    (first, second) = gateway.store.said_of("chatcmpl-1")
    assert (first.correction, first.comment) == ("say [EMAIL]", "not [EMAIL]")
    assert (first.unusable, second.unusable) == (REDACTED, "")
    kept = gateway.store.interaction("chatcmpl-1")
    assert kept is not None
    assert kept.messages[0]["content"] == "hi [EMAIL]"
    folder = gateway.settings.data_dir
    raw = b"".join(file.read_bytes() for file in folder.glob("experience.db*"))
    assert secret.encode() not in raw


async def test_feedback_on_an_episode_that_is_not_in_the_sample_says_why(gateway: Gateway) -> None:
    said = EpisodeFeedback("run-1", 1.0)
    with pytest.raises(UnknownEpisode):
        gateway.keep_feedback(said)
    settings = gateway.settings.capture.model_copy(update={"sample": 0.0})
    gateway.settings = gateway.settings.model_copy(update={"capture": settings})
    assert gateway.keep_feedback(said) == Receipt("", REASONS["sample"])


async def test_feedback_on_an_answer_that_was_removed_says_why(gateway: Gateway) -> None:
    await Client(App(), gateway).request(CHAT, QUESTION)
    gateway.store.remove_older(1e-9, lambda: 0)
    assert gateway.keep_feedback(Feedback("chatcmpl-1", 1.0)) == Receipt("", TOO_OLD)
    with pytest.raises(UnknownInteraction):
        gateway.keep_feedback(Feedback("chatcmpl-2", 1.0))


async def test_a_stream_whose_client_goes_away_is_kept_and_cannot_be_learnt(
    gateway: Gateway,
) -> None:
    class Leaving(App):
        async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
            async def send_some(message: Message) -> None:
                if message.get("body") == b"data: [DONE]\n\n":
                    raise asyncio.CancelledError  # as Starlette, when the client has gone
                await send(message)

            await super().__call__(scope, receive, send_some)

    with pytest.raises(asyncio.CancelledError):
        await Client(Leaving(stream=True), gateway).request(CHAT, QUESTION | {"stream": True})
    gateway.recorder.close()
    kept = gateway.store.interaction("chatcmpl-1")
    assert kept is not None
    assert (kept.answer, kept.finish_reason, kept.unusable) == ("yes", "abort", ABORTED)
    receipt = gateway.keep_feedback(Feedback("chatcmpl-1", 1.0))
    assert receipt.unusable == ABORTED
    assert gateway.recorder.counts() == RecorderCounts(1, 0, 0)
