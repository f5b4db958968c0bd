"""Feedback through vLLM's real app: labels, streams under way, tool calls, keys, taking back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from edge_node.access import Scope, create_key, keys_file
from edge_node.serving import gateway as gateways
from tests.contract.served_ids.running import CHAT, Running, trained

pytestmark = pytest.mark.timeout(240)
QUESTION = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
FEEDBACK = "/v1/feedback"
CALL = {"function": {"name": "weather", "arguments": {"at": "Oslo", "days": 2}}}


def ask(running: Running, **headers: str) -> str:
    response = running.post(CHAT, QUESTION, **headers)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def call(running: Running, method: str, path: str, **headers: str) -> Any:
    gateways.here = running.server.gateway
    return running.wait(running.server.http.request(method, path, headers=headers))


def tell(running: Running, status: int = 200, body: Any = None, **headers: str) -> Any:
    response = running.post(FEEDBACK, body, **headers)
    assert response.status_code == status, response.text
    return response.json()


def test_feedback_is_given_read_back_and_taken_back(qwen: Running) -> None:
    answer = ask(qwen)
    told = tell(qwen, body={"id": answer, "thumb": "up", "comment": "good"})
    path = f"{FEEDBACK}/{told['id']}"
    read = call(qwen, "GET", path).json()
    assert {name: read[name] for name in ("kind", "thumb", "comment", "interaction", "usable")} == {
        "kind": "thumb", "thumb": "up", "comment": "good", "interaction": answer, "usable": True,
    }  # fmt: skip
    gone = call(qwen, "DELETE", path)
    assert (gone.status_code, gone.json()["deleted"]) == (200, True)
    assert call(qwen, "DELETE", path).json() == gone.json()
    assert call(qwen, "GET", path).status_code == 410
    assert call(qwen, "GET", f"{FEEDBACK}/fb-none").status_code == 404
    assert call(qwen, "GET", f"{FEEDBACK}/a/b").status_code == 404
    assert trained(qwen, told["id"]) is None


def test_a_correction_by_tool_calls_is_learnt_in_the_models_own_format(qwen: Running) -> None:
    answer = ask(qwen)
    told = tell(qwen, body={"id": answer, "tool_calls": [CALL, CALL]})
    row = trained(qwen, told["id"])
    written = (
        '<tool_call>\n{"name": "weather", "arguments": {"at": "Oslo", "days": 2}}\n</tool_call>'
    )
    target = qwen.renderer.answer_ids(f"{written}\n{written}")
    assert row.input_ids[-len(target) :] == target
    as_text = {"id": ask(qwen), "correction": f"{written}\n{written}"}
    again = trained(qwen, tell(qwen, body=as_text)["id"])
    assert again.input_ids[-len(target) :] == target, "as a correction in text"
    read = call(qwen, "GET", f"{FEEDBACK}/{told['id']}").json()
    assert read["tool_calls"][1]["function"] == CALL["function"]


def test_tool_calls_that_cannot_fit_or_be_shown_are_told(qwen: Running) -> None:
    long = {"function": {"name": "weather", "arguments": {"at": "x" * 300_000}}}
    told = tell(qwen, body={"id": ask(qwen), "tool_calls": [long]})
    assert (told["usable"], "more than 2048 tokens" in told["reason"]) == (False, True)
    started = Running("chatml")
    try:
        answer = ask(started)
        refused = tell(started, 400, {"id": answer, "tool_calls": [CALL]})
        assert "shows no tool calls. Send what the model should" in refused["error"]["message"]
    finally:
        started.close()


def test_labels_are_kept_and_an_episode_is_judged_as_a_whole(qwen: Running) -> None:
    labels = {"x-lorikeet-episode": "run-7", "x-lorikeet-environment": "desk"}
    answers = [ask(qwen, **labels) for _ in range(2)]
    kept = qwen.server.gateway.store.interaction(answers[0])
    assert kept is not None
    assert (kept.episode, kept.environment) == ("run-7", "desk")
    told = tell(qwen, body={"episode": "run-7", "score": 1})
    assert (told["answers"], told["usable"]) == (2, True)
    assert [qwen.server.gateway.store.verdict(one) for one in answers] == ["liked", "liked"]
    unknown = tell(qwen, 404, {"episode": "run-8", "score": 1})
    assert "x-lorikeet-episode" in unknown["error"]["message"]
    refused = qwen.post(CHAT, QUESTION, **{"x-lorikeet-episode": "two words"})
    assert (refused.status_code, "two words" in refused.text) == (400, True)


def test_a_stream_is_judged_before_it_ends(qwen: Running) -> None:
    """The client knows the id from the first event; the answer is stored with the last one."""
    gateway, server = qwen.server.gateway, qwen.server
    began, go_on = asyncio.Event(), asyncio.Event()
    generate = server.engine.generate

    async def slow(*args: Any, **kwargs: Any) -> Any:
        number = 0
        async for output in generate(*args, **kwargs):
            number += 1
            if number == 3:
                await go_on.wait()
            yield output

    sent: list[dict[str, Any]] = []
    asked: list[bool] = []
    app = server.http._transport.app  # type: ignore[attr-defined]
    body = json.dumps(QUESTION | {"stream": True}).encode()
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
        "root_path": "", "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("node", 80),
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        if asked:
            await asyncio.Event().wait()
        asked.append(True)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if message.get("body", b"").startswith(b"data: {"):
            began.set()

    async def story() -> None:
        server.engine.generate = slow  # type: ignore[method-assign]
        gateways.here = gateway
        stream = asyncio.create_task(app(scope, receive, send))
        await began.wait()
        first = next(m["body"] for m in sent if m.get("body", b"").startswith(b"data: {"))
        answer = json.loads(first[6:].split(b"\n")[0])["id"]
        early = await server.http.post(FEEDBACK, json={"id": answer, "correction": "right"})
        assert (early.status_code, early.json()["waiting"]) == (202, True), early.text
        path = f"{FEEDBACK}/{early.json()['id']}"
        assert (await server.http.get(path)).json()["waiting"] is True
        go_on.set()
        await stream
        read = (await server.http.get(path)).json()
        assert (read["usable"], "waiting" in read) == (True, False)
        assert gateway.store.verdict(answer) == "correction"
        late = await server.http.post(FEEDBACK, json={"id": answer, "thumb": "down"})
        assert late.status_code == 200
        assert gateway.store.verdict(answer) == "correction"

    qwen.wait(asyncio.wait_for(story(), 30))
    server.engine.generate = generate  # type: ignore[method-assign]


def test_an_idempotency_key_writes_once(qwen: Running) -> None:
    answer, cursor = ask(qwen), qwen.server.gateway.store.cursor()
    body, key = {"id": answer, "score": 1}, {"idempotency-key": "abc"}
    first = tell(qwen, body=body, **key)
    assert tell(qwen, body={"score": 1.0, "id": answer}, **key) == first, "the same words"
    other = tell(qwen, 422, {"id": answer, "score": 0}, **key)
    assert "'abc' came with another body" in other["error"]["message"]
    assert qwen.server.gateway.store.cursor() == cursor + 1
    assert (
        "Idempotency-Key" in tell(qwen, 400, body, **{"idempotency-key": "a b"})["error"]["message"]
    )


# The last one: from now on this server needs a key.
def test_a_key_with_a_user_reaches_its_own_feedback_only(qwen: Running) -> None:
    gateway = qwen.server.gateway
    file, scopes = keys_file(gateway.settings), [Scope.INFER, Scope.FEEDBACK]
    keys = {
        name: {"authorization": f"Bearer {create_key(file, name, scopes, user)}"}
        for name, user in (("alice", "alice"), ("bob", "bob"), ("app", None))
    }
    asking = {"authorization": f"Bearer {create_key(file, 'asks', [Scope.INFER], None)}"}
    gateway.keys.refresh()
    answer = ask(qwen, **keys["alice"])
    told = tell(qwen, body={"id": answer, "score": 1}, **keys["alice"])
    tell(qwen, 404, {"id": answer, "score": 1}, **keys["bob"])
    path = f"{FEEDBACK}/{told['id']}"
    statuses = [call(qwen, "GET", path, **keys[name]).status_code for name in keys]
    assert statuses == [200, 404, 200]
    assert call(qwen, "DELETE", path, **keys["bob"]).status_code == 404
    assert call(qwen, "GET", path).status_code == 401
    assert call(qwen, "GET", path, **asking).status_code == 403
    assert call(qwen, "GET", "/v1/openapi.json", **keys["bob"]).json()["openapi"] == "3.1.0"
    assert call(qwen, "DELETE", path, **keys["alice"]).status_code == 200
    assert [call(qwen, "GET", path, **keys[name]).status_code for name in keys] == [
        410,
        404,
        410,
    ]
