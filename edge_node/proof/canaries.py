"""What vLLM serves on the canary prompts, asked over the node's own socket.

In: a reference, the names of served versions. Out: log-probabilities of its tokens, each prompt
asked twice of the release: computed anew, and from the prefix cache. Guarantees: nothing is
captured. A canary is made of random tokens, so it holds nobody's text.

vLLM computes a prompt anew whenever its own tokens' log-probabilities are asked for, and reads the
prefix cache when only the next token's are. So the first answer has both, the second the next token
alone. vLLM 0.32 also takes `logprob_token_ids`, but a request with it takes the likeliest tokens
from all others of its step, users' ones too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from edge_node.errors import ServingError
from edge_node.proof.distance import Following, Reference, Served
from edge_node.releases.asking import ask
from lorikeet.together import together

CONNECTIONS = 32
LIKELIEST = 10
"""Tokens that may follow a canary; vLLM gives at most --max-logprobs, which is 20."""


async def ask_canaries(
    client: httpx.AsyncClient, reference: Reference, name: str, base: str, before: str | None
) -> Served:
    """Raises ServingError when vLLM does not answer, or not in numbers."""
    models = [name, base, *([before] if before is not None else [])]
    # All at once: rows of a batch must not get each other's weights.
    answers = await together(_ask_all(client, model, reference) for model in models)
    own = [np.array([values for values, _ in rows], np.float32) for rows in answers]
    cached = await together(_ask_cached(client, name, prompt) for prompt in reference.prompts)
    return Served(
        release=own[0],
        base=own[1],
        before=own[2] if before is not None else None,
        anew=[following for _, following in answers[0]],
        cached=cached,
    )


async def _ask_all(
    client: httpx.AsyncClient, model: str, reference: Reference
) -> list[tuple[list[float], Following]]:
    return await together(_ask_anew(client, model, prompt) for prompt in reference.prompts)


async def _ask_anew(
    client: httpx.AsyncClient, model: str, prompt: list[int]
) -> tuple[list[float], Following]:
    """Log-probabilities of the prompt's tokens after the first, and of those that may follow."""
    choice = await _ask(client, model, prompt, {"prompt_logprobs": 0})
    try:
        places = zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
        own = [float(entry[str(token)]["logprob"]) for token, entry in places]
    except (LookupError, TypeError, ValueError) as error:
        raise _without_numbers(model, error) from error
    return own, _following(model, choice)


async def _ask_cached(client: httpx.AsyncClient, model: str, prompt: list[int]) -> Following:
    return _following(model, await _ask(client, model, prompt, {}))


async def _ask(
    client: httpx.AsyncClient, model: str, prompt: Sequence[int], more: dict[str, Any]
) -> dict[str, Any]:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 1.0,  # log-probabilities are the model's own in either --logprobs-mode
        "logprobs": LIKELIEST,
        "return_tokens_as_token_ids": True,
    }
    answer = await ask(client, "/v1/completions", body | more, "a canary")
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def _following(model: str, choice: dict[str, Any]) -> Following:
    try:
        likeliest = choice["logprobs"]["top_logprobs"][0]
        found = {int(key.removeprefix("token_id:")): float(p) for key, p in likeliest.items()}
        # The sampled token is there too, however unlikely it is: it is another one each time.
        return dict(sorted(found.items(), key=lambda item: -item[1])[:LIKELIEST])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _without_numbers(model, error) from error


def _without_numbers(model: str, error: Exception) -> ServingError:
    return ServingError(
        f"vLLM's answer to a canary for {model} lacks log-probabilities: {error!r}."
    )
