"""vLLM's own classes do what the proof counts on; no engine starts."""

from __future__ import annotations

import importlib
import json
from typing import Any

import httpx
import numpy as np
import pytest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.logprobs import Logprob
from vllm.utils.import_utils import resolve_obj_by_qualname

from edge_node.proof.canaries import LIKELIEST, ask_canaries
from edge_node.proof.distance import Reference
from edge_node.serving.command import CPU_WORKER, WORKER_EXTENSION
from edge_node.serving.fingerprint import WEIGHTS, name_weights

VALUES = np.zeros((1, 2), np.float32)


async def canaries() -> list[dict[str, Any]]:
    """The bodies that a proof sends: one computed anew, one that may read the prefix cache."""
    bodies: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        likeliest = {f"token_id:{token}": -1.0 for token in range(LIKELIEST)}
        choice = {
            "logprobs": {"top_logprobs": [likeliest]},
            "prompt_logprobs": [None, {"4": {"logprob": -1.0}}, {"5": {"logprob": -1.0}}],
        }
        return httpx.Response(200, json={"model": bodies[-1]["model"], "choices": [choice]})

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://node")
    await ask_canaries(client, Reference([[3, 4, 5]], VALUES, VALUES), "release", "base", None)
    return [body for body in bodies if body["model"] == "release"]


async def test_the_first_answer_is_computed_anew_and_the_second_reads_the_cache() -> None:
    anew, cached = [CompletionRequest(**body) for body in await canaries()]
    sampling = [one.to_sampling_params(1, {}) for one in (anew, cached)]
    assert [one.skip_reading_prefix_cache for one in sampling] == [True, False]
    assert [one.prompt_logprobs for one in sampling] == [0, None]
    assert [one.logprobs for one in sampling] == [LIKELIEST] * 2
    assert anew.prompt == [3, 4, 5]


async def test_likeliest_tokens_come_by_their_ids() -> None:
    request = CompletionRequest(**(await canaries())[1])
    serving = OpenAIServingCompletion.__new__(OpenAIServingCompletion)
    step = {9: Logprob(-3.0, 4, "x")} | {token: Logprob(-1.0, 1, "x") for token in range(5)}
    made = serving._create_completion_logprobs(
        token_ids=[9],
        top_logprobs=[step],
        num_output_top_logprobs=request.logprobs or 0,
        tokenizer=None,
        return_as_token_id=request.return_tokens_as_token_ids,
    )
    assert made.top_logprobs[0] == {
        "token_id:9": -3.0, **{f"token_id:{token}": -1.0 for token in range(5)}
    }  # fmt: skip


def test_the_fingerprint_of_a_request_is_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("vllm.entrypoints.generate.base.serving")
    monkeypatch.setattr(module.GenerateBaseServing, "system_fingerprint", None, raising=False)
    servings = [kind.__new__(kind) for kind in (OpenAIServingChat, OpenAIServingCompletion)]
    servings[0].system_fingerprint = "vllm-0.32.0-abc"  # as before the plug-in is asked
    name_weights()
    servings[1].system_fingerprint = "vllm-0.32.0-def"
    own = ["vllm-0.32.0-abc", "vllm-0.32.0-def"]
    assert [one.system_fingerprint for one in servings] == own
    token = WEIGHTS.set("5e1")
    assert [one.system_fingerprint for one in servings] == ["5e1", "5e1"]
    WEIGHTS.reset(token)
    assert [one.system_fingerprint for one in servings] == own


def test_each_worker_can_be_extended() -> None:
    extension = resolve_obj_by_qualname(WORKER_EXTENSION)
    added = [name for name in dir(extension) if not name.startswith("__")]
    assert added == ["lorikeet_held"]
    worker = resolve_obj_by_qualname(CPU_WORKER)
    assert not hasattr(worker, "lorikeet_held")
