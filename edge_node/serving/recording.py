"""The ids, and on demand the log-probabilities, of captured requests, from the engine's outputs.

In: vLLM's outputs of a request whose context has a Served. Out: what the model read and wrote, in
it; the same outputs. Guarantee: what a client did not ask for is not in what it gets.
"""

from __future__ import annotations

import importlib
from array import array
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from edge_node.capture import SERVED, Generation, Made

Generate = Callable[..., AsyncGenerator[Any, None]]
UNFINISHED = ("abort", "error")
"""Reasons that end an answer before its end."""


def recorded(generate: Generate) -> Generate:
    """The engine's `generate`, which also leaves the ids of captured requests in SERVED.

    It is called in the context of the HTTP request that it works for, once for each of its prompts.
    A request for several answers also leaves each answer's log-probabilities: a client may score
    them. Where it did not ask for them, the engine's outputs hold none when they go on.
    """
    delta = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA

    def recording(
        prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        served = SERVED.get()
        if served is None:
            return generate(prompt, sampling_params, *args, **kwargs)
        # Any other kind of prompt is one with images, audio, video or embeddings.
        generation = Generation(
            text_only=isinstance(prompt, dict) and prompt.get("type") == "token"
        )
        served.generations.append(generation)
        several = generation.text_only and sampling_params.n > 1
        wanted = several or served.wants_logprobs
        ours = wanted and sampling_params.num_logprobs is None
        if ours:
            sampling_params.logprobs = 0  # of the sampled token alone
        outputs = generate(prompt, sampling_params, *args, **kwargs)
        kept = _Kept(
            delta=sampling_params.output_kind == delta,
            several=several,
            logprobs=served.wants_logprobs,
            ours=ours,
        )
        return _record(outputs, generation, kept)

    return recording


@dataclass(frozen=True)
class _Kept:
    """What is kept of a request. delta: its outputs are pieces. several: every choice. logprobs:
    those of the first choice. ours: nobody but us asked for log-probabilities.
    """

    delta: bool
    several: bool
    logprobs: bool
    ours: bool


async def _record(
    outputs: AsyncGenerator[Any, None], generation: Generation, kept: _Kept
) -> AsyncGenerator[Any, None]:
    # Closed with this one: a client that goes away must still abort its request in the engine.
    async with aclosing(outputs):
        async for output in outputs:
            ids = output.prompt_token_ids
            if ids is not None and not generation.prompt_ids:  # each piece of a stream may have it
                # A session holds the prompts of many turns: four bytes a token.
                generation.prompt_ids = array("i", ids) if kept.logprobs else ids
            for choice in output.outputs:
                if choice.index == 0:
                    if not kept.delta:
                        generation.answer_ids, generation.logprobs = [], []
                    generation.answer_ids.extend(choice.token_ids)
                    if kept.logprobs:
                        generation.logprobs.extend(_logprobs(choice))
                    generation.finished = choice.finish_reason not in (None, *UNFINISHED)
                if kept.several:
                    _record_choice(generation, choice, kept.delta)
                if kept.ours:
                    choice.logprobs = choice.cumulative_logprob = None
            yield output


def _record_choice(generation: Generation, choice: Any, delta: bool) -> None:
    """A token without a log-probability leaves one out: then the group cannot be learnt."""
    made = generation.choices.setdefault(choice.index, Made()) if delta else Made()
    made.answer_ids.extend(choice.token_ids)
    made.logprobs.extend(
        known[token].logprob
        for token, known in zip(choice.token_ids, choice.logprobs or (), strict=False)
        if known and token in known
    )
    generation.choices[choice.index] = made


def _logprobs(choice: Any) -> list[float]:
    """Of the choice's tokens, one each."""
    places = zip(choice.logprobs, choice.token_ids, strict=True)
    return [place[token].logprob for place, token in places]
