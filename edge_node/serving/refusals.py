"""Requests that cannot be read: what a client is told with the 400.

In: the body of a completion request; vLLM's `generate`. Out: the request, or an Unreadable that
names the field, the value and what was expected. Guarantees: a request that fails before the
engine works on it is answered 400, not 500. A failure of the engine stays a 500.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from reprlib import repr  # the value seen, cut short
from typing import Any, cast

from edge_node.serving import routes

MAX_DEPTH = 100
"""Deepest nesting of a body. vLLM takes JSON schemas of at most 64 levels."""
INT64 = range(-(2**63), 2**63)
LENGTH_PENALTY = 50.0
"""Largest of beam search, either way: vLLM divides by length ** penalty, which is a float."""
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What Python raises for a value that is not what code expects."""
_TYPES = {
    routes.CHAT: ("openai.chat_completion.protocol", "ChatCompletionRequest"),
    routes.TEXT: ("openai.completion.protocol", "CompletionRequest"),
    routes.RESPONSES: ("openai.responses.protocol", "ResponsesRequest"),
    routes.MESSAGES: ("anthropic.protocol", "AnthropicMessagesRequest"),
    routes.COUNT_TOKENS: ("anthropic.protocol", "AnthropicCountTokensRequest"),
    routes.TOKENIZE: ("serve.tokenize.protocol", "TokenizeCompletionRequest"),
    routes.DETOKENIZE: ("serve.tokenize.protocol", "DetokenizeRequest"),
    routes.SCORING: ("generate.generative_scoring.serving", "GenerativeScoringRequest"),
}
"""Route -> module of vllm.entrypoints and class that describe its request."""
_TOKENIZE_CHAT = "TokenizeChatRequest"
_Path = tuple[Any, ...]
"""(path of the container, key or index); empty for the body itself."""


class Unreadable(ValueError):
    """A request that the client has to change; `param` is the field, when one is known."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass
class Progress:
    """How far one HTTP request has come."""

    in_engine: bool = False
    most_prompt_tokens: int | None = None
    """Longest prompt that this request may have; None: no bound of ours."""
    refused: str | None = None
    """Why the engine cannot answer it: what the client has to change."""


PROGRESS: ContextVar[Progress | None] = ContextVar("progress", default=None)
"""Set by the middleware; the engine is called in the context of the HTTP request."""


def read_request(body: bytes) -> dict[str, Any] | None:
    """The request; None for a body that is no JSON object, which vLLM's own 400 names.

    Raises:
        Unreadable: a value that no field can take: see `_wrong`.
    """
    try:
        request = json.loads(body)
    except RecursionError:
        raise _too_deep() from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    except ValueError as error:  # Python reads integers up to a number of digits
        raise Unreadable(f"The body holds an integer that is too long: {error}.") from None
    if not isinstance(request, dict):
        return None
    _check(request)
    _check_length_penalty(request.get("length_penalty"))
    return request


def _check_length_penalty(value: Any) -> None:
    try:
        usable = abs(float(value)) <= LENGTH_PENALTY
    except (TypeError, ValueError, OverflowError):
        return  # vLLM's own 400 names it
    if not usable:
        raise Unreadable(
            f"length_penalty is {repr(value)}; expected a number from -{LENGTH_PENALTY:g} to "
            f"{LENGTH_PENALTY:g}.",
            "length_penalty",
        )


def _check(request: dict[str, Any]) -> None:
    """Without recursion, in memory for the depth alone: a body may hold millions of values."""
    stack: list[tuple[Iterator[tuple[Any, Any]], _Path]] = [(_children(request, ()), ())]
    while stack:
        children, path = stack[-1]
        for key, value in children:
            if isinstance(value, dict | list):
                if len(stack) == MAX_DEPTH:
                    raise _too_deep()
                stack.append((_children(value, (path, key)), (path, key)))
                break
            if (expected := _wrong(value)) is not None:
                field = _name((path, key))
                raise Unreadable(f"{field} is {repr(value)}; expected {expected}.", field)
        else:
            stack.pop()


def _children(container: dict[str, Any] | list[Any], path: _Path) -> Iterator[tuple[Any, Any]]:
    if isinstance(container, list):
        return iter(enumerate(container))
    for key in container:
        if (expected := _wrong(key)) is not None:
            field = _name(path) or "The body"
            raise Unreadable(f"{field} has the key {repr(key)}; expected {expected}.")
    return iter(container.items())


def _wrong(value: Any) -> str | None:
    """What was expected of a JSON value that neither the engine nor its messages can carry."""
    if isinstance(value, str):
        if value.isascii():
            return None
        try:
            value.encode()
        except UnicodeEncodeError:
            return "Unicode text, without half a surrogate pair (\\ud800 to \\udfff)"
    elif isinstance(value, float):
        if not math.isfinite(value):
            return "a finite number"
    elif isinstance(value, int) and value not in INT64:
        return "a whole number from -2**63 to 2**63 - 1"
    return None


def _name(path: _Path) -> str:
    parts = []
    while path:
        path, key = path
        parts.append(str(key))
    return ".".join(reversed(parts))


def _too_deep() -> Unreadable:
    return Unreadable(f"The body's JSON is nested too deeply; expected at most {MAX_DEPTH} levels.")


def explain(path: str, request: dict[str, Any], error: Exception) -> Unreadable:
    """What is wrong with a request on which vLLM failed with `error` before its engine had it."""
    pydantic = importlib.import_module("pydantic")
    module, name = _TYPES[path]
    if name == "TokenizeCompletionRequest" and "messages" in request:
        name = _TOKENIZE_CHAT
    request_type = getattr(importlib.import_module(f"vllm.entrypoints.{module}"), name)
    for field, description in request_type.model_fields.items():
        if field not in request:
            continue
        try:
            pydantic.TypeAdapter(description.annotation).validate_python(request[field])
        except pydantic.ValidationError as mistakes:
            text = mistakes.errors(include_url=False)[0]["msg"]
            return Unreadable(f"{field} is {repr(request[field])}; {text}.", field)
        except UNREADABLE as own:
            return Unreadable(
                f"{field} is {repr(request[field])}; vLLM cannot read it: {own}.", field
            )
    return Unreadable(
        f"vLLM cannot read this request ({type(error).__name__}: {error}). Expected the fields of "
        "OpenAI's API."
    )


def refusing(generate: Any) -> Any:
    """The engine's `generate`, which raises VLLMValidationError for three kinds of request.

    The prompt of the first is longer than this node takes, the engine cannot begin the second, and
    no answer can satisfy the constraint of the third. All are answered 400.
    """

    def refuse(
        prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        progress = PROGRESS.get() or Progress()
        progress.in_engine = True
        if (text := _too_long(prompt, progress.most_prompt_tokens)) is not None:
            return _refused(progress, text)
        outputs = generate(prompt, sampling_params, *args, **kwargs)
        return _refuse(outputs, sampling_params, progress)

    return refuse


def _too_long(prompt: Any, most: int | None) -> str | None:
    if most is None or not isinstance(prompt, dict):
        return None
    tokens = prompt.get("prompt_token_ids")
    tokens = prompt.get("prompt_embeds") if tokens is None else tokens
    if tokens is None or len(tokens) <= most:
        return None
    return (
        f"The prompt has {len(tokens)} tokens; this node takes at most {most} "
        "(EDGE_SERVING__LIMITS__PROMPT_TOKENS). Send a shorter one."
    )


def _mistake(progress: Progress, text: str, parameter: str | None = None) -> Exception:
    """What vLLM answers 400; a stream that has begun cannot say it, so the middleware does."""
    progress.refused = text
    error = importlib.import_module("vllm.exceptions").VLLMValidationError
    return cast(Exception, error(text, parameter=parameter))


async def _refused(progress: Progress, text: str) -> AsyncGenerator[Any, None]:
    raise _mistake(progress, text)
    yield


async def _refuse(
    outputs: AsyncGenerator[Any, None], sampling_params: Any, progress: Progress
) -> AsyncGenerator[Any, None]:
    failed = importlib.import_module("vllm.v1.engine.exceptions").EngineGenerateError
    constraint, began = sampling_params.structured_outputs, False
    try:
        async with aclosing(outputs):
            async for output in outputs:
                if constraint is not None and _ended_in_error(output):
                    raise _mistake(progress, _cannot_be_kept(constraint), "structured_outputs")
                began = True
                yield output
    except failed as error:
        cause = error.__cause__
        if began or not isinstance(cause, UNREADABLE):
            raise
        text = f"The engine cannot take this request ({type(cause).__name__}: {cause})."
        raise _mistake(progress, text) from error
    except Exception as error:
        if not began and progress.refused is None and _is_the_clients(error):
            progress.refused = str(error)
        raise


def _is_the_clients(error: Exception) -> bool:
    """vLLM answers it 400, where it has not begun to answer."""
    of_vllm = importlib.import_module("vllm.exceptions").VLLMClientError
    return isinstance(error, of_vllm | ValueError | TypeError | OverflowError)


def _ended_in_error(output: Any) -> bool:
    return any(choice.finish_reason == "error" for choice in output.outputs)


def _cannot_be_kept(constraint: Any) -> str:
    kinds = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
    kind = next((kind for kind in kinds if getattr(constraint, kind) is not None), "constraint")
    return (
        f"No answer satisfies this request's {kind} {repr(getattr(constraint, kind, None))}. "
        "Expected one that compiles and that the tokens of this model can spell; it comes from "
        "structured_outputs, response_format or tools."
    )
