"""vLLM's real app over TCP: our own routes answer what our OpenAPI document says, and never 500.

schemathesis makes requests of the document, valid ones and others, and compares the answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from edge_node.access import Scope, create_key, keys_file
from edge_node.serving import gateway as gateways
from edge_node.serving.openapi import openapi
from examples.ports import free_port
from tests.contract.served_ids.running import CHAT, Running

schemathesis = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.timeout(240)
positive_data_acceptance = pytest.importorskip(
    "schemathesis.specs.openapi.checks"
).positive_data_acceptance
SCHEMA = schemathesis.openapi.from_dict(openapi())
EXAMPLES = 25
QUIET = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class Listening:
    """The app on a port, which needs a key, with answers and feedback to speak of."""

    def __init__(self, running: Running) -> None:
        gateway = gateways.here = running.server.gateway
        key = create_key(keys_file(gateway.settings), "app", [Scope.INFER, Scope.FEEDBACK], None)
        gateway.keys.refresh()
        self.headers = {"Authorization": f"Bearer {key}"}
        app = running.server.http._transport.app  # type: ignore[attr-defined]
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        config = uvicorn.Config(app, port=port, lifespan="off", log_level="error")
        self._server, self._running = uvicorn.Server(config), running
        self._serving = asyncio.run_coroutine_threadsafe(self._server.serve(), running._loop)
        transport = httpx.HTTPTransport(retries=20)
        self._http = httpx.Client(
            base_url=self.url, headers=self.headers, transport=transport, timeout=60
        )
        question = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        self.answers = [self.post(CHAT, question | {"n": n})["id"] for n in (1, 1, 2)]

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self._http.post(path, json=body).raise_for_status().json()
        return answer

    def about_what_is_there(self, case: Any, pick: int) -> None:
        """Makes the case speak of an answer, or of feedback, that is there."""
        answer = self.answers[pick % 3]
        if isinstance(case.body, dict):
            texts = ("id", "chosen", "rejected")
            known = {name: answer for name in texts if isinstance(case.body.get(name), str)}
            if "chosen" in known:
                known["rejected"] = self.answers[(pick + 1) % 3]
            if isinstance(case.body.get("chosen"), int):
                known |= {"chosen": pick % 2, "rejected": (pick + 1) % 3}
            if isinstance(case.body.get("scores"), list):
                known["scores"] = case.body["scores"][:2]
            case.body = case.body | known
        elif case.path_parameters:
            said = {"id": answer, "score": 1, "comment": str(pick)}
            case.path_parameters["feedback_id"] = self.post("/v1/feedback", said)["id"]

    def close(self) -> None:
        self._http.close()
        self._server.should_exit = True
        self._serving.result(30)
        self._running.close()


@pytest.fixture(scope="module")
def node() -> Iterator[Listening]:
    listening = Listening(Running("qwen3"))
    yield listening
    listening.close()


OPERATIONS = [
    (path, method)
    for path, item in openapi()["paths"].items()
    for method in item
    if method in ("get", "post", "delete")
]
OF_FEEDBACK = [(path, method) for path, method in OPERATIONS if "feedback" in path]


def ask(node: Listening, path: str, method: str, mode: str, *, known: bool = False) -> set[int]:
    """The statuses of requests that schemathesis makes; each answer is compared."""
    cases = SCHEMA[path][method.upper()].as_strategy(
        generation_mode=getattr(schemathesis.GenerationMode, mode)
    )
    seen = set[int]()

    @QUIET
    @given(case=cases, pick=st.integers(0, 5))
    def one(case: Any, pick: int) -> None:
        if known:
            node.about_what_is_there(case, pick)
        response = case.call(base_url=node.url, headers=node.headers)
        # What the document allows may not fit this answer: it has one choice, or is the same.
        beside = [positive_data_acceptance] if known else []
        case.validate_response(response, excluded_checks=beside, headers=node.headers)
        seen.add(response.status_code)

    one()
    return seen


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_what_the_document_allows_is_taken(node: Listening, path: str, method: str) -> None:
    expected = {404} if (path, method) in OF_FEEDBACK else {200}
    assert expected <= ask(node, path, method, "POSITIVE") <= {200, 400, 404}


@pytest.mark.parametrize(("path", "method"), OF_FEEDBACK)
def test_what_the_document_does_not_allow_is_refused(
    node: Listening, path: str, method: str
) -> None:
    assert ask(node, path, method, "NEGATIVE") <= {400, 401, 404, 405}


@pytest.mark.parametrize(("path", "method"), OF_FEEDBACK)
def test_what_is_there_is_answered_as_the_document_says(
    node: Listening, path: str, method: str
) -> None:
    assert 200 in ask(node, path, method, "POSITIVE", known=True) <= {200, 400, 404, 422}
