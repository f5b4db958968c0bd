"""What vLLM serves on the canary prompts, asked over the node's own socket.

In: a reference, the names of served versions. Out: log-probabilities of its tokens, each prompt
asked twice of the release: computed anew, and from the prefix cache. Guarantees: nothing is
captured. A canary is made of random tokens, so it holds nobody's text.

vLLM computes a prompt anew whenever its own tokens' log-probabilities are asked for, and reads the
prefix cache when only the next token's are. So the first answer has both, the second the next token
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from edge_node.errors import ServingError
from edge_node.proof.distance import Reference, Served, Values
from edge_node.releases.asking import ask
from lorikeet.together import together

CONNECTIONS = 32


async def ask_canaries(
    client: httpx.AsyncClient, reference: Reference, name: str, base: str, before: str | None
) -> Served:
    """Raises ServingError when vLLM does not answer, or not in numbers."""
    models = [name, base, *([before] if before is not None else [])]
    # All at once: rows of a batch must not get each other's weights.
    answers = await together(_rows(client, reference, model, anew=True) for model in models)
    again = await _rows(client, reference, name, anew=False)
    return Served(answers[0], again, answers[1], answers[2] if before is not None else None)


async def _rows(
    client: httpx.AsyncClient, reference: Reference, model: str, *, anew: bool
) -> Values:
    pairs = zip(reference.prompts, reference.probes, strict=True)
    rows = await together(_row(client, model, *pair, anew=anew) for pair in pairs)
    return np.array(rows, np.float32)


async def _row(
    client: httpx.AsyncClient, model: str, prompt: list[int], probes: list[int], *, anew: bool
) -> list[float]:
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 1.0,  # log-probabilities are the model's own in either --logprobs-mode
        "logprobs": 0,
        "logprob_token_ids": probes,
        "return_tokens_as_token_ids": True,
    }
    answer = await ask(
        client, "/v1/completions", body | ({"prompt_logprobs": 0} if anew else {}), "a canary"
    )
    try:
        choice = answer["choices"][0]
        following = choice["logprobs"]["top_logprobs"][0]
        values = [following[f"token_id:{token}"] for token in probes]
        if anew:
            values = [*_own(prompt, choice["prompt_logprobs"]), *values]
        return [float(value) for value in values]
    except (LookupError, TypeError, ValueError) as error:
        raise ServingError(
            f"vLLM's answer to a canary for {model} lacks log-probabilities: {error!r}."
        ) from error


def _own(prompt: Sequence[int], entries: Sequence[Any]) -> list[float]:
    """Of the prompt's tokens after the first."""
    places = zip(prompt[1:], entries[1:], strict=True)
    return [entry[str(token)]["logprob"] for token, entry in places]
