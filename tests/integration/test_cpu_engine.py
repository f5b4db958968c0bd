"""A real vLLM on CPU: whose weights answer whom in one batch, and requests that must not end its engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.integration.serving_node import CHAT, COMPLETIONS, ServingNode, serving_node

pytestmark = pytest.mark.timeout(420)

BLOCK = " ".join(f"w{number}" for number in range(130))
"""Longer than the 128 tokens that vLLM caches together on CPU: base and adapters must not share them."""
PROMPTS = [f"{prefix}w{number} w{number + 1}" for prefix in ("", f"{BLOCK} ") for number in range(4)]
RANKS = {1: 4, 2: 1, 3: 8, 4: 3}
"""As many adapters as vLLM has slots, of different ranks: a base request marked -1 must not find the last one."""
ONE_USER = {"messages": [{"role": "user", "content": "w1 w2 w3"}], "max_tokens": 3}
TWO_PROMPTS = {"prompt": ["w1 w2 w3", "w4 w5 w6"], "max_tokens": 3}
ENDED_THE_ENGINE: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, TWO_PROMPTS | {"echo": True, "logprobs": False}),
    (COMPLETIONS, TWO_PROMPTS | {"echo": "yes", "logprobs": 0.0}),
    (COMPLETIONS, TWO_PROMPTS | {"echo": True, "logprobs": False, "stream": True}),
    (COMPLETIONS, TWO_PROMPTS | {"echo": True, "logprobs": 1, "n": 2}),
    (COMPLETIONS, TWO_PROMPTS | {"prompt_logprobs": False}),
    (CHAT, ONE_USER | {"echo": True}),
    (CHAT, ONE_USER | {"echo": "true", "stream": True}),
    (CHAT, ONE_USER | {"prompt_logprobs": 0}),
]


async def alone_and_together(node: ServingNode) -> None:
    """Each model's text for each prompt, one request after the other, is its text in a batch of all of them."""
    asked = [(model, prompt) for prompt in PROMPTS for model in (node.base, *node.versions)]
    alone = [await node.text(prompt, model) for model, prompt in asked]
    assert len(set(alone[: len(node.versions) + 1])) == len(node.versions) + 1, "the adapters must show in the text"
    for _ in range(2):  # the second time from the prefix cache
        together = await asyncio.gather(*(node.text(prompt, model) for model, prompt in asked))
        wrong = [model for (model, _), one, other in zip(asked, alone, together, strict=True) if one != other]
        assert wrong == []


async def test_every_request_is_answered_by_its_own_weights_and_none_ends_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    async with serving_node(RANKS, dtype="float32") as node:
        await alone_and_together(node)
        for path, body in ENDED_THE_ENGINE:
            bodies = [body | {"model": model} for model in (node.base, *node.versions)]
            answers = await asyncio.gather(*(node.http.post(path, json=each) for each in bodies))
            assert [answer.status_code for answer in answers] == [400] * len(bodies), answers[0].text
            assert "CPU node" in answers[0].json()["error"]["message"]
            await node.text("w1", node.base)
        assert node.vllm.generation == 1, "the engine must not have been started again"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "multiprocessing"),
    [("2", "0"), ("2", "1"), ("1", "1")],
    ids=["spawned engine core", "spawned core and worker", "forked core and worker"],
)
async def test_wherever_the_worker_runs(monkeypatch: pytest.MonkeyPatch, threads: str, multiprocessing: str) -> None:
    """With more than one thread nothing is forked: each process imports vLLM and its plug-ins anew."""
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", multiprocessing)
    async with serving_node(RANKS, dtype="float32") as node:
        assert node.log.read_text().count("Using AdapterProducts") == 1
        await alone_and_together(node)
