"""A real vLLM on CPU: whose weights answer in one batch; log-probabilities of prompts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.fakes.tiny_model import text_ids
from tests.integration import likelihoods
from tests.integration.serving_node import CHAT, COMPLETIONS, ServingNode, serving_node

pytestmark = pytest.mark.timeout(420)

BLOCK = " ".join(f"w{number}" for number in range(130))
"""Longer than the 128 tokens that vLLM caches: base and adapters must not share them."""
PROMPTS = [
    f"{prefix}w{number} w{number + 1}" for prefix in ("", f"{BLOCK} ") for number in range(4)
]
RANKS = {1: 4, 2: 1, 3: 8, 4: 3}
"""One adapter a slot, of different ranks: a base row (-1) must not find the last one."""
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
"""vLLM's own LoRA on CPU takes the rows of such a prompt for rows of the batch, and dies."""
TEXTS = [" ".join(f"w{(7 * i + 3 * k) % 240}" for i in range(40 + k)) for k in range(3)]
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.6}
"""Nats. This model's logits are large; bfloat16 keeps eight bits of them."""


async def alone_and_together(node: ServingNode) -> None:
    """Each model's text for a prompt alone is its text in a batch of all prompts."""
    asked = [(model, prompt) for prompt in PROMPTS for model in (node.base, *node.versions)]
    alone = [await node.text(prompt, model) for model, prompt in asked]
    assert len(set(alone[: len(node.versions) + 1])) == len(node.versions) + 1, (
        "the adapters must show in the text"
    )
    for _ in range(2):  # the second time from the prefix cache
        together = await asyncio.gather(*(node.text(prompt, model) for model, prompt in asked))
        wrong = [
            model
            for (model, _), one, other in zip(asked, alone, together, strict=True)
            if one != other
        ]
        assert wrong == []


async def likelihoods_are_each_models_own(node: ServingNode, tolerance: float) -> None:
    """Prompts' log-probabilities of base and adapters, asked in one batch, beside PEFT's."""
    directories = [None, *(node.directory(version) for version in node.versions)]
    asked = [
        (model, directory, text)
        for text in TEXTS
        for model, directory in zip((node.base, *node.versions), directories, strict=True)
    ]
    same = {"max_tokens": 1, "temperature": 0}
    answers = await asyncio.gather(
        *(
            node.http.post(COMPLETIONS, json=same | {"model": model, "prompt": text} | more)
            for model, _, text in asked
            for more in ({"prompt_logprobs": 0}, {"echo": True, "logprobs": 0}, {})
        )
    )
    assert {answer.status_code for answer in answers} == {200}
    for number, (_, directory, text) in enumerate(asked):
        ids = text_ids(text)
        expected = likelihoods.of_transformers(ids, directory)
        by_prompt, by_echo, plain = (
            answer.json()["choices"][0] for answer in answers[3 * number : 3 * number + 3]
        )
        assert likelihoods.of_answer(by_prompt, ids) == pytest.approx(expected, abs=tolerance)
        assert by_echo["logprobs"]["token_logprobs"][1:-1] == pytest.approx(expected, abs=tolerance)
        assert by_echo["text"].endswith(plain["text"])
        assert by_prompt["text"] == plain["text"]


async def seeds_decide_whatever_the_chunks(node: ServingNode) -> None:
    """A request with a seed, alone and beside others that leave little room in a step."""
    long = " ".join(f"w{(11 * i) % 240}" for i in range(90))
    body = {"max_tokens": 12, "temperature": 1.0, "seed": 7, "n": 2}

    async def texts(prompt: str) -> list[str]:
        asked = body | {"model": node.versions[0], "prompt": prompt}
        answer = await node.http.post(COMPLETIONS, json=asked)
        assert answer.status_code == 200, answer.text
        return [str(choice["text"]) for choice in answer.json()["choices"]]

    alone = [await texts(f"w{i} {long}") for i in range(6)]
    together = await asyncio.gather(*(texts(f"w{i} {long}") for i in range(6)))
    assert together == alone


async def test_every_request_is_answered_by_its_own_weights_and_none_ends_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--max-num-batched-tokens", "64", "--max-num-seqs", "32"]
    async with serving_node(RANKS, arguments, dtype="float32") as node:
        await alone_and_together(node)
        await seeds_decide_whatever_the_chunks(node)
        for path, body in ENDED_THE_ENGINE:
            bodies = [body | {"model": model} for model in (node.base, *node.versions)]
            answers = await asyncio.gather(*(node.http.post(path, json=each) for each in bodies))
            assert [answer.status_code for answer in answers] == [200] * len(bodies), answers[
                0
            ].text
            await node.text("w1", node.base)
        await likelihoods_are_each_models_own(node, TOLERANCE["float32"])
        assert node.vllm.generation == 1, "the engine must not have been started again"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "multiprocessing"),
    [("2", "0"), ("2", "1"), ("1", "1")],
    ids=["spawned engine core", "spawned core and worker", "forked core and worker"],
)
async def test_wherever_the_worker_runs(
    monkeypatch: pytest.MonkeyPatch, threads: str, multiprocessing: str
) -> None:
    """With more than one thread nothing is forked: each process imports vLLM anew."""
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", multiprocessing)
    async with serving_node(RANKS, dtype="float32") as node:
        assert node.log.read_text().count("Using AdapterProducts") == 1
        await alone_and_together(node)


@pytest.mark.slow
async def test_likelihoods_in_bfloat16_and_of_prompts_that_are_cut_into_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--max-num-batched-tokens", "32"]
    async with serving_node(RANKS, arguments, dtype="bfloat16") as node:
        await likelihoods_are_each_models_own(node, TOLERANCE["bfloat16"])
        assert node.vllm.generation == 1
