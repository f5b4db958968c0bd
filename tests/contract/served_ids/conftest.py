"""Servers of two kinds, one for each test file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.served_ids.running import Running
from tests.fakes.chat_templates import STYLES


@pytest.fixture(scope="module", params=sorted(STYLES))
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    started = Running(request.param)
    yield started
    started.close()


@pytest.fixture(scope="module")
def qwen() -> Iterator[Running]:
    """As an operator of a tool-calling, reasoning model starts it."""
    started = Running(
        "qwen3", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        "--reasoning-parser", "qwen3",
        "--default-chat-template-kwargs", '{"enable_thinking": false}',
    )  # fmt: skip
    yield started
    started.close()
