"""A request and its capture as spans, without a word of what was said."""

from __future__ import annotations

from pathlib import Path

from edge_node.serving.middleware import LorikeetMiddleware
from tests.fakes.gateway import make_gateway, make_version
from tests.fakes.spans import recorded_spans
from tests.unit.edge_node.serving.test_access import Client
from tests.unit.edge_node.serving.test_middleware import CHAT, QUESTION, V1, App


async def test_request_and_capture(tmp_path: Path) -> None:
    gateway = make_gateway(tmp_path)
    await gateway.load(V1, make_version(tmp_path, "v1"))
    gateway.point(V1)
    client = Client(gateway, LorikeetMiddleware(App(), gateway))
    with recorded_spans() as spans:
        assert await client.ask(CHAT, body=QUESTION) == 200
        assert await client.ask("/health") == 200
    gateway.recorder.close()
    request, capture = spans.one("request"), spans.one("capture")
    assert capture.parent is not None
    assert capture.parent.span_id == request.context.span_id
    assert dict(request.attributes or {}) == {
        "lorikeet.route": CHAT, "lorikeet.status": 200, "lorikeet.version": V1,
    }  # fmt: skip
    assert not capture.attributes
