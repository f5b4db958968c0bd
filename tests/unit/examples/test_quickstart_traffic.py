"""What the traffic driver sends and counts, against a node inside the test."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from edge_node.environments import Document
from examples.quickstart.environments import CompanyApi
from examples.quickstart.traffic import is_exact, measure, measure_texts, send_wave

URL = "http://node.test"
ENVIRONMENT = CompanyApi("A")
TASKS = ENVIRONMENT.tasks("train", count=20, seed=0)
BY_TEXT = {task.messages[0]["content"]: task for task in TASKS}


class Node:
    """Answers rightly unless `is_wrong` says so; keeps what it was sent."""

    def __init__(
        self, is_wrong: Callable[[int], bool] = lambda n: False, model: str = "lorikeet@v3-7f3a9c01"
    ) -> None:
        self.is_wrong = is_wrong
        self.model = model
        self.asked: list[dict[str, Any]] = []
        self.feedback: list[dict[str, Any]] = []
        self.status = {"/v1/chat/completions": 200, "/v1/feedback": 200}

    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self.respond)

    def respond(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        status = self.status[request.url.path]
        if status != 200:
            return httpx.Response(status, json={"error": {"message": "refused"}})
        if request.url.path == "/v1/feedback":
            self.feedback.append(body)
            return httpx.Response(200, json={"id": "f", "interaction": body["id"]})
        number = len(self.asked)
        self.asked.append(body)
        right = ENVIRONMENT.reference_answer(BY_TEXT[body["messages"][0]["content"]])
        message = {"role": "assistant", "content": "{}" if self.is_wrong(number) else right}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        completion = {
            "id": f"chatcmpl-{number}",
            "object": "chat.completion",
            "created": 0,
            "model": self.model,
        }
        return httpx.Response(200, json=completion | {"choices": [choice]})


async def test_wave_posts_a_score_and_a_correction_where_the_answer_failed() -> None:
    node = Node(is_wrong=lambda number: number % 4 == 0)
    wave = await send_wave(URL, "lorikeet", ENVIRONMENT, TASKS, transport=node.transport())
    assert (wave.passed, wave.corrected, wave.total, wave.failed, wave.inexact) == (15, 5, 40, 0, 0)
    assert wave.models == {"lorikeet@v3-7f3a9c01": 20}
    prompts = {
        f"chatcmpl-{number}": body["messages"][0]["content"]
        for number, body in enumerate(node.asked)
    }
    assert {feedback["id"] for feedback in node.feedback} == set(prompts)
    for feedback in node.feedback:
        failed = int(feedback["id"].removeprefix("chatcmpl-")) % 4 == 0
        expected = ENVIRONMENT.reference_answer(BY_TEXT[prompts[feedback["id"]]])
        assert feedback["score"] == (0.0 if failed else 1.0)
        assert feedback.get("correction") == (expected if failed else None)


async def test_requests_are_greedy_and_use_the_alias() -> None:
    node = Node()
    await measure(URL, "lorikeet", ENVIRONMENT, TASKS[:3], transport=node.transport())
    assert len(node.asked) == 3
    assert all(body["temperature"] == 0 and body["model"] == "lorikeet" for body in node.asked)


async def test_measure_counts_and_posts_nothing() -> None:
    node = Node(is_wrong=lambda number: number < 5)
    measured = await measure(
        URL, "lorikeet@v3-7f3a9c01", ENVIRONMENT, TASKS, transport=node.transport()
    )
    assert (measured.passed, measured.total, measured.inexact, measured.success) == (
        15,
        20,
        0,
        75.0,
    )
    assert node.feedback == []


async def test_failed_requests_are_counted_once_and_never_retried() -> None:
    node = Node()
    node.status["/v1/chat/completions"] = 503
    measured = await measure(URL, "lorikeet", ENVIRONMENT, TASKS, transport=node.transport())
    assert (measured.total, measured.failed, measured.passed) == (20, 20, 0)
    assert "503" in measured.errors[0]


async def test_refused_feedback_counts_as_failed() -> None:
    node = Node(is_wrong=lambda number: True)
    node.status["/v1/feedback"] = 404
    wave = await send_wave(URL, "lorikeet", ENVIRONMENT, TASKS, transport=node.transport())
    assert (wave.total, wave.failed, wave.corrected) == (40, 20, 0)
    assert wave.errors[0].startswith("/v1/feedback 404")


async def test_texts_are_measured_token_by_token() -> None:
    """vLLM gives no value for a prompt's first token."""

    def respond(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        assert (body["model"], body["prompt_logprobs"]) == ("lorikeet@v3-7f3a9c01", 0)
        if body["prompt"] == "three":
            return httpx.Response(503, json={})
        entries = [None, *({"7": {"logprob": value}} for value in (-1.0, -4.0))]
        entries += [{"7": {"logprob": -1.0}}] if body["prompt"] == "two" else []
        choice = {"index": 0, "text": "", "prompt_logprobs": entries}
        return httpx.Response(200, json={"model": body["model"], "choices": [choice]})

    texts = [Document(text, text) for text in ("one", "two", "three")]
    measured = await measure_texts(
        URL, "lorikeet@v3-7f3a9c01", texts, transport=httpx.MockTransport(respond)
    )
    assert (measured.total, measured.failed, measured.inexact) == (3, 1, 0)
    assert (measured.tokens, measured.mean) == (5, pytest.approx(-2.2))


async def test_answers_without_an_exact_version_are_counted() -> None:
    wave = await send_wave(
        URL, "lorikeet", ENVIRONMENT, TASKS, transport=Node(model="lorikeet").transport()
    )
    assert wave.inexact == 20


def test_exact_names() -> None:
    assert is_exact("lorikeet@v0-00ff00ff", "lorikeet")
    for name in (
        "lorikeet",
        "lorikeet@v1",
        "other@v1-00ff00ff",
        "lorikeet@v1-00FF00FF",
        "lorikeet@v1-00ff00ff0",
        "",
    ):
        assert not is_exact(name, "lorikeet")
