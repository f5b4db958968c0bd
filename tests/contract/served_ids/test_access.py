"""vLLM's real app behind the access layer: every route that it has, and a browser's preflight."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from edge_node.access import Scope, create_key, keys_file
from edge_node.serving import gateway as gateways
from tests.contract.served_ids.running import CHAT, Running

pytestmark = pytest.mark.timeout(240)
QUESTION = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    started = Running("chatml", "--allowed-origins", '["https://a.example"]')
    yield started
    started.close()


@pytest.fixture(scope="module")
def key(running: Running) -> str:
    gateway = running.server.gateway
    made = create_key(keys_file(gateway.settings), "app", [Scope.INFER], "alice")
    gateway.keys.refresh()
    return made


def ask(running: Running, method: str, path: str, **headers: str) -> httpx.Response:
    gateways.here = running.server.gateway
    response: httpx.Response = running.wait(
        running.server.http.request(method, path, headers=headers)
    )
    return response


def routes(running: Running) -> Iterator[tuple[str, str]]:
    """Every path of the app with each of its methods."""
    app = running.server.http._transport.app  # type: ignore[attr-defined]
    for route in app.routes:
        for method in getattr(route, "methods", None) or ("GET", "POST", "OPTIONS"):
            yield method, route.path
        if route.path.startswith("/metrics"):
            yield "GET", "/metrics"


def test_no_route_of_vllm_answers_without_a_key(running: Running, key: str) -> None:
    asked = set(routes(running))
    assert {("POST", CHAT), ("GET", "/metrics"), ("GET", "/v1/models")} <= asked
    answered = set()
    for method, path in asked:
        for headers in ({}, {"authorization": "Bearer lk-wrong"}):
            if ask(running, method, path, **headers).status_code != 401:
                answered.add(path)
    assert answered == {"/health", "/ready"}


def test_a_preflight_says_what_is_allowed_and_nothing_else(running: Running, key: str) -> None:
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    for path in ("/metrics", CHAT, "/v1/feedback"):
        response = ask(running, "OPTIONS", path, **headers)
        assert (response.status_code, response.text) == (200, "OK")
        assert response.headers["access-control-allow-origin"]


def test_a_key_asks_and_its_user_is_kept(running: Running, key: str) -> None:
    response = running.post(CHAT, QUESTION, authorization=f"Bearer {key}", **{"x-request-id": "r1"})
    assert (response.status_code, response.headers["x-request-id"]) == (200, "r1")
    kept = running.server.gateway.store.interaction(response.json()["id"])
    assert kept is not None
    assert kept.user == "alice"
    refused = running.post(CHAT, QUESTION | {"n": 10_000}, authorization=f"Bearer {key}")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
