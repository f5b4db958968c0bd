"""Redaction and answers that are not kept, through vLLM's real app and tokenizer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge_node.capture.choosing import REASONS
from edge_node.experience.usable import REDACTED
from tests.contract.served_ids.running import CHAT, COMPLETIONS, Running, check, served, trained

pytestmark = pytest.mark.timeout(240)
SECRET = "anna.schmidt@example.org"
ASKED = {"messages": [{"role": "user", "content": f"Grüße an {SECRET} 🙂 bitte"}], "max_tokens": 40}
KEPT = "Grüße an [EMAIL] 🙂 bitte"


def post(running: Running, path: str, body: Any, **headers: str) -> str:
    """The answer's id."""
    response = running.post(path, body, **headers)
    assert response.status_code == 200, response.text
    return str(json.loads(response.text.removeprefix("data: ").splitlines()[0])["id"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_secret_in_the_prompt_is_learnt_by_nobody(running: Running, stream: bool) -> None:
    body = {**ASKED, "stream": stream, "return_token_ids": True}
    response = running.post(CHAT, body)
    assert response.status_code == 200, response.text
    answer_id, prompt, answer = served(response)
    tokenizer = running.renderer.tokenizer
    assert SECRET in tokenizer.decode(prompt), "the model still reads it"
    kept = running.server.gateway.store.interaction(answer_id)
    assert kept is not None
    assert kept.messages[0]["content"] == KEPT
    assert kept.redacted == ("prompt",)
    text = tokenizer.decode(list(kept.prompt_ids))
    assert text == tokenizer.decode(prompt).replace(SECRET, "[EMAIL]")
    assert list(kept.answer_ids) == answer, "what holds no secret stays as it was served"
    alike = 0
    while kept.prompt_ids[alike] == prompt[alike]:
        alike += 1
    assert tokenizer.decode(prompt[:alike]).endswith("an "), "and so do the tokens before it"
    told = running.post("/v1/feedback", {"id": answer_id, "score": 1}).json()
    assert told["usable"]
    row = trained(running, told["id"])
    assert SECRET not in tokenizer.decode(row.input_ids)
    assert row.input_ids[-len(answer) :] == answer


def test_an_answer_with_a_secret_is_not_learnt_but_its_correction_is(qwen: Running) -> None:
    engine = qwen.server.engine
    before, engine.answer = engine.answer, qwen.renderer.answer_ids(f"Write to {SECRET}.")
    try:
        answer_id = post(qwen, CHAT, {"messages": [{"role": "user", "content": "Who?"}]})
    finally:
        engine.answer = before
    kept = qwen.server.gateway.store.interaction(answer_id)
    assert kept is not None
    assert kept.answer.startswith("Write to [EMAIL].")
    assert kept.redacted == ("0",)
    for body, usable in (
        ({"score": 1}, False),
        ({"correction": f"Ask {SECRET}."}, False),
        ({"correction": "Ask your colleague."}, True),
    ):
        told = qwen.post("/v1/feedback", {"id": answer_id, **body}).json()
        assert (told["usable"], told.get("reason")) == (usable, None if usable else REDACTED)


def test_scores_of_answers_to_a_redacted_prompt_are_not_used(qwen: Running) -> None:
    answer_id = post(qwen, CHAT, {**ASKED, "n": 2, "max_tokens": 2})
    told = qwen.post("/v1/feedback", {"id": answer_id, "scores": [0, 1]}).json()
    assert (told["usable"], told["reason"]) == (False, REDACTED)
    better = qwen.post("/v1/feedback", {"id": answer_id, "chosen": 1, "rejected": 0}).json()
    assert better["usable"], "a preference needs no log-probabilities of the engine"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_id_of_an_answer_that_is_not_kept_says_why(qwen: Running, stream: bool) -> None:
    for path, body in ((CHAT, ASKED), (COMPLETIONS, {"prompt": "a", "max_tokens": 2})):
        off = {"x-lorikeet-capture": "off"}
        answer_id = post(qwen, path, {**body, "stream": stream}, **off)
        told = qwen.post("/v1/feedback", {"id": answer_id, "score": 1})
        assert told.status_code == 200
        assert told.json() == {
            "id": None, "interaction": answer_id, "usable": False, "reason": REASONS["request"],
        }  # fmt: skip
        assert qwen.server.gateway.store.interaction(answer_id) is None


def test_requests_without_secrets_are_learnt_as_before(qwen: Running) -> None:
    assert check(qwen, CHAT, {"messages": [{"role": "user", "content": "Rain?"}]}, "It rains.")
