"""Log-probabilities of documents under candidate and reference.

In: two served versions, documents. Out: lorikeet.releases.v1.PairedLikelihood; texts and the values
of single documents stay here. The measure is a document's mean log-probability over its tokens
after the first, in nats. Guarantees: both releases are given the same tokens, and every value is
finite.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from edge_node.environments import Document
from edge_node.errors import EnvironmentFault, NoLikelihood, ServingError
from edge_node.releases.asking import CONCURRENCY, ask
from lorikeet.together import together
from protos.releases.v1 import releases_pb2

MAX_TOKENS = 1024
"""Of a document that are read. vLLM holds their logits beside all else that is in its memory: with
a vocabulary of 150,000 that is 0.6 GB each time as float32."""
NO_VALUE = -9999.0
"""What vLLM writes where a log-probability is minus infinity."""


@dataclass(frozen=True)
class Measured:
    """One document under one release: tokens with a value, their mean log-probability in nats."""

    tokens: int
    mean: float


async def compare_likelihood(
    client: httpx.AsyncClient,
    candidate: str,
    reference: str,
    environment: str,
    documents: Sequence[Document],
) -> releases_pb2.PairedLikelihood | None:
    """None without documents.

    Raises:
        ServingError: a request failed.
        EnvironmentFault: a document is too short.
        NoLikelihood: a value is not finite.
    """
    if not documents:
        return None
    longest = await _longest_prompt(client)
    with_reference, with_candidate = await together(
        _measure(client, model, environment, documents, longest) for model in (reference, candidate)
    )
    return paired(with_reference, with_candidate)


def paired(
    reference: Sequence[Measured], candidate: Sequence[Measured]
) -> releases_pb2.PairedLikelihood:
    """The message on the same documents, at least one, in the same order.

    Raises ServingError when the two releases saw different tokens.
    """
    if [measured.tokens for measured in reference] != [measured.tokens for measured in candidate]:
        raise ServingError("Candidate and reference were given different tokens of a document.")
    differences = [
        after.mean - before.mean for before, after in zip(reference, candidate, strict=True)
    ]
    return releases_pb2.PairedLikelihood(
        documents=len(differences),
        tokens=sum(measured.tokens for measured in reference),
        reference_mean=math.fsum(measured.mean for measured in reference) / len(reference),
        candidate_mean=math.fsum(measured.mean for measured in candidate) / len(candidate),
        difference_sum=math.fsum(differences),
        difference_square_sum=math.fsum(value * value for value in differences),
    )


def mean_of(values: Sequence[float], environment: str, document: Document, model: str) -> Measured:
    """values: log-probabilities of the document's tokens after the first.

    Raises:
        EnvironmentFault: there are none.
        NoLikelihood: one is not finite.
    """
    if not values:
        raise EnvironmentFault(
            environment,
            f"Document {document.id!r} of environment {environment!r} has fewer than two tokens; "
            "expected two or more.",
        )
    if not all(math.isfinite(value) and value > NO_VALUE for value in values):
        raise NoLikelihood(
            f"{model} gives a token of document {document.id!r} of environment {environment!r} no "
            "finite log-probability. Look at that release, or serve in another EDGE_SERVING__DTYPE."
        )
    return Measured(len(values), math.fsum(values) / len(values))


async def _longest_prompt(client: httpx.AsyncClient) -> int:
    """Tokens of a prompt that leave room for the one that vLLM has to make."""
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise ServingError(f"vLLM did not say how much text it serves: {error!r}.") from error
    return min(MAX_TOKENS, int(response.json()["data"][0]["max_model_len"]) - 1)


async def _measure(
    client: httpx.AsyncClient,
    model: str,
    environment: str,
    documents: Sequence[Document],
    longest: int,
) -> list[Measured]:
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(document: Document) -> Measured:
        body = {
            "model": model,
            "prompt": document.text,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
            "truncate_prompt_tokens": longest,
            "truncation_side": "right",
        }
        async with gate:
            answer = await ask(client, "/v1/completions", body, f"document {document.id}")
        entries = answer["choices"][0]["prompt_logprobs"][1:]
        # With 0 further tokens asked for, an entry holds the prompt's own token alone.
        values = [float(found["logprob"]) for entry in entries for found in entry.values()]
        return mean_of(values, environment, document, model)

    return await together(one(document) for document in documents)
