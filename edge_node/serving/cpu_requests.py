"""Requests that a CPU node refuses, decided on what vLLM has made of them.

In: vLLM's request types. Out: the same types, which answer 400 where they ask for log-probabilities of the prompt.
Guarantees: no such request reaches the engine, however it is spelt: `"echo": true, "logprobs": false` too, because
vLLM reads false as 0, and `"echo": true` alone in a chat, because vLLM then takes `top_logprobs`, which is 0.

vLLM 0.32 with LoRA on CPU takes the rows of a prompt for rows of the batch. Its engine died of that as soon as two
requests shared a step, and took every other request with it.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError


def refuse_prompt_logprobs() -> None:
    """Once per API server, before the first request."""
    for request_type in (ChatCompletionRequest, CompletionRequest):
        request_type.to_sampling_params = _without_prompt_logprobs(request_type.to_sampling_params)


def _without_prompt_logprobs(to_sampling_params: Any) -> Any:
    @wraps(to_sampling_params)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = to_sampling_params(self, *args, **kwargs)
        if parameters.prompt_logprobs is not None:
            raise VLLMValidationError(
                _mistake(self), parameter="prompt_logprobs" if self.prompt_logprobs is not None else "echo"
            )
        return parameters

    return checked


def _mistake(request: Any) -> str:
    if request.prompt_logprobs is not None:
        return "prompt_logprobs is not available on a CPU node. Leave it out; logprobs of the answer work."
    if isinstance(request, ChatCompletionRequest):
        return "echo is not available in a chat on a CPU node. Leave it out."
    return "echo together with logprobs is not available on a CPU node. Leave one of them out."
