"""What a round trains on is what vLLM served, in token ids, whatever was asked.

Each request also asks for `return_token_ids`, so that vLLM itself says what it served.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.contract.served_ids.bodies import chat, completion, correction, messages
from tests.contract.served_ids.running import CHAT, COMPLETIONS, Running, check, served
from tests.fakes.chat_templates import STYLES

pytestmark = pytest.mark.timeout(240)


many = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(chat, correction)
@many
def test_chat_trains_on_the_served_ids(
    running: Running, body: dict[str, Any], right: str | None
) -> None:
    check(running, CHAT, body, right)


@given(completion, correction)
@many
def test_completions_train_on_the_served_ids(
    running: Running, body: dict[str, Any], right: str | None
) -> None:
    check(running, COMPLETIONS, body, right)


def test_most_of_these_requests_were_answered(running: Running) -> None:
    assert running.statuses.count(200) >= len(running.statuses) / 2


@given(messages)
@many
def test_a_task_is_rendered_as_vllm_renders_it(
    running: Running, said: list[dict[str, Any]]
) -> None:
    """Anchors and tasks were never served: rendered here, evaluated through the endpoint."""
    response = running.post(
        CHAT, {"messages": said, "temperature": 0, "max_tokens": 1, "return_token_ids": True}
    )
    if response.status_code == 200:
        assert running.renderer.prompt_ids(said) == served(response)[1]


def test_an_answer_ends_as_the_template_ends_it(running: Running) -> None:
    (style,) = [
        name
        for name, (template, _) in STYLES.items()
        if template == running.renderer.tokenizer.chat_template
    ]
    end = running.renderer.tokenizer.convert_tokens_to_ids(STYLES[style][1])
    assert running.renderer.answer_ids("ok")[-1] == end
    assert running.renderer.answer_ids(f"ok{STYLES[style][1]}") == running.renderer.answer_ids(
        "ok"
    ), "said once"
    assert running.server.gateway.engine.answer_ids("ok") == running.renderer.answer_ids("ok")
