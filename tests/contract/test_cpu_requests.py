"""What a CPU node refuses is decided on vLLM's own reading of a request. No engine is started."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError

from edge_node.serving.cpu_requests import _without_prompt_logprobs

pytestmark = pytest.mark.timeout(240)

PROMPT = {"prompt": ["a b c", "d e f"], "max_tokens": 3}
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
REQUESTS = [(CompletionRequest, PROMPT), (ChatCompletionRequest, CHAT)]


def sampling(request_type: Any, body: dict[str, Any]) -> Any:
    """The parameters as a CPU node makes them; the type itself stays as vLLM has it."""
    return _without_prompt_logprobs(request_type.to_sampling_params)(request_type(**body), 3, {})


@pytest.mark.parametrize(
    ("request_type", "body", "message"),
    [
        (CompletionRequest, PROMPT | {"echo": True, "logprobs": False}, "echo together with logprobs"),
        (CompletionRequest, PROMPT | {"echo": "yes", "logprobs": 0.0}, "echo together with logprobs"),
        (CompletionRequest, PROMPT | {"echo": 1, "logprobs": 1, "stream": True}, "echo together with logprobs"),
        (CompletionRequest, PROMPT | {"prompt_logprobs": False}, "prompt_logprobs is not available"),
        (CompletionRequest, PROMPT | {"prompt_logprobs": True}, "prompt_logprobs is not available"),
        (ChatCompletionRequest, CHAT | {"prompt_logprobs": 0.0}, "prompt_logprobs is not available"),
        (ChatCompletionRequest, CHAT | {"echo": True}, "echo is not available in a chat"),
        (ChatCompletionRequest, CHAT | {"echo": "on", "stream": True}, "echo is not available in a chat"),
    ],
)
def test_prompt_logprobs_are_refused_however_they_are_spelt(request_type: Any, body: Any, message: str) -> None:
    with pytest.raises(VLLMValidationError, match=message):
        sampling(request_type, body)


@pytest.mark.parametrize("more", [{}, {"echo": False}, {"prompt_logprobs": None}], ids=str)
def test_other_requests_keep_their_parameters(more: dict[str, Any]) -> None:
    assert sampling(CompletionRequest, PROMPT | {"logprobs": 2} | more).logprobs == 2
    assert sampling(ChatCompletionRequest, CHAT | {"logprobs": True} | more).logprobs == 0
    assert sampling(CompletionRequest, PROMPT | {"echo": True}).prompt_logprobs is None


VALUES = st.sampled_from([None, False, True, 0, 1, 2, -1, 0.0, -0.0, 1.0, "0", "1", "true", "yes", [], {}])


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(REQUESTS),
    st.dictionaries(st.sampled_from(["echo", "logprobs", "top_logprobs", "prompt_logprobs", "stream"]), VALUES),
)
def test_nothing_that_asks_for_them_gets_through(request_and_body: Any, more: dict[str, Any]) -> None:
    request_type, body = request_and_body
    try:
        parameters = sampling(request_type, body | more)
    except ValueError:
        return  # pydantic's or vLLM's own 400
    except VLLMValidationError:
        return
    assert parameters.prompt_logprobs is None
