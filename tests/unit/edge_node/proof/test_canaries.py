"""Canaries as vLLM is asked them: computed anew and from the prefix cache, of each version."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest

from edge_node.errors import ServingError
from edge_node.proof.canaries import ask_canaries
from edge_node.proof.distance import Reference

PROMPTS = [[3, 4, 5], [5, 6, 7]]
VALUES = np.zeros((2, 2), np.float32)
KNOWN = Reference(PROMPTS, VALUES, VALUES)


def vllm(requests: list[dict[str, Any]], lacks: str = "") -> httpx.AsyncClient:
    """Gives token t of model m the log-probability -(t + its number / 10).

    Tokens 1 to 10 are the likeliest to follow; the sampled one is 99 more unlikely each time.
    """
    models = ["release", "base", "before"]

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        assert request.headers["x-lorikeet-capture"] == "off"
        requests.append(body)
        shift = models.index(body["model"]) / 10
        likeliest = {f"token_id:{t}": -(t + shift) for t in range(1, body["logprobs"] + 1)}
        sampled = {f"token_id:{100 + len(requests)}": -99.0 * len(requests)}
        choice: dict[str, Any] = {"logprobs": {"top_logprobs": [{**sampled, **likeliest}]}}
        if "prompt_logprobs" in body:
            rest = [{str(t): {"logprob": -(t + shift)}} for t in body["prompt"][1:]]
            choice["prompt_logprobs"] = [None, *rest]
        choice.pop(lacks, None)
        return httpx.Response(200, json={"model": body["model"], "choices": [choice]})

    return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://node")


async def test_each_version_is_asked_and_the_release_twice() -> None:
    requests: list[dict[str, Any]] = []
    served = await ask_canaries(vllm(requests), KNOWN, "release", "base", "before")
    assert served.release.tolist() == [[-4, -5], [-6, -7]]
    assert served.base == pytest.approx(served.release - 0.1)
    assert served.before is not None
    assert served.before == pytest.approx(served.release - 0.2)
    assert served.anew == served.cached == [{t: -t for t in range(1, 11)}] * 2
    anew = [one for one in requests if "prompt_logprobs" in one]
    cached = [one for one in requests if "prompt_logprobs" not in one]
    assert [one["model"] for one in cached] == ["release"] * 2
    assert len(anew) == 6
    assert requests.index(cached[0]) > max(
        requests.index(one) for one in anew if one["model"] == "release"
    ), "the cache is read after it was filled"
    assert not any("logprob_token_ids" in one for one in requests), "it spoils users' answers"


async def test_without_a_version_before_none_is_asked() -> None:
    requests: list[dict[str, Any]] = []
    served = await ask_canaries(vllm(requests), KNOWN, "release", "base", None)
    assert served.before is None
    assert {one["model"] for one in requests} == {"release", "base"}


@pytest.mark.parametrize("lacks", ["logprobs", "prompt_logprobs"])
async def test_an_answer_without_numbers_is_an_error(lacks: str) -> None:
    with pytest.raises(ServingError, match="lacks log-probabilities"):
        await ask_canaries(vllm([], lacks), KNOWN, "release", "base", None)
