"""A ToolEnvironment in its worker: the schemas of its tools, and its open episodes.

In: an environment; calls of its tools, with the arguments that a model wrote. Out: JSON schemas;
what the model is told; rewards. Guarantees: a call that goes wrong is a text for the model, never
an exception. What breaks the contract is ContractBroken. No more than MAX_OPEN episodes are open.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edge_node.environments.contract import ToolEnvironment
from edge_node.environments.wire import ContractBroken, plain_answer, plain_reward

MAX_OPEN = 256
"""Most episodes that one worker has open."""
KNOWN_NAMES = frozenset({"tasks", "reset", "get_reward", "feedback", "close", "tools", "call_tool"})
"""Public methods that are no tools."""


def tool_schemas(environment: ToolEnvironment) -> list[dict[str, Any]]:
    """JSON schemas of the tools, in the order of their definition; raises ContractBroken.

    Those of methods are made by transformers' get_json_schema.
    """
    given = getattr(environment, "tools", None)
    if given is not None:
        try:
            schemas = given()
        except Exception as error:  # a plug-in may raise anything
            raise ContractBroken(
                f"raised {type(error).__name__} in tools; expected JSON schemas."
            ) from error
        return _expect_schemas(schemas)
    from transformers.utils import get_json_schema

    schemas = []
    for name in _tool_names(environment):
        method = getattr(environment, name)
        if inspect.iscoroutinefunction(method):
            raise ContractBroken(f"has an async tool {name}; expected a plain method.")
        try:
            schema = get_json_schema(method)
        except Exception as error:  # transformers' exceptions have no base of their own
            raise ContractBroken(
                f"has a tool {name} without a schema ({type(error).__name__}: {error}); expected a "
                "type hint for each argument, and a docstring with a line for each under `Args:`."
            ) from error
        schema["function"].pop("return", None)  # the OpenAI API has none
        schemas.append(schema)
    return _expect_schemas(schemas)


def _tool_names(environment: ToolEnvironment) -> list[str]:
    defined = {name: None for kind in reversed(type(environment).__mro__) for name in vars(kind)}
    return [
        name
        for name in defined
        if not name.startswith("_")
        and name not in KNOWN_NAMES
        and inspect.isroutine(inspect.getattr_static(environment, name))
    ]


def _expect_schemas(schemas: object) -> list[dict[str, Any]]:
    if not isinstance(schemas, Sequence) or not schemas:
        raise ContractBroken(
            "has no tool; expected a public method with type hints and a docstring, or a list of "
            "schemas from tools()."
        )
    names = [_name_of(schema) for schema in schemas]
    if len(set(names)) < len(names):
        raise ContractBroken(f"has two tools of one name: {', '.join(names)}.")
    try:
        plain: list[dict[str, Any]] = json.loads(json.dumps(list(schemas)))
    except (TypeError, ValueError) as error:
        raise ContractBroken(
            f"has a tool whose schema is no JSON ({type(error).__name__}); expected plain values."
        ) from error
    return plain


def _name_of(schema: object) -> str:
    function = schema.get("function") if isinstance(schema, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ContractBroken(
            'has a tool whose schema has no name; expected {"type": "function", "function": '
            '{"name": ..., "description": ..., "parameters": ...}}.'
        )
    return name


class OpenEpisodes:
    """The open episodes of one worker, by the numbers that the node gives them."""

    def __init__(self, make: Callable[[], ToolEnvironment], names: Sequence[str]) -> None:
        """make: a new instance, for one episode. names: of its tools."""
        self._make = make
        self._names = list(names)
        self._open: dict[int, ToolEnvironment] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._open

    def reset(self, number: int, task: Any) -> str | None:
        """Opens episode `number`; what `reset` gave. Raises what the plug-in raises."""
        data = getattr(task, "data", None)
        if not isinstance(data, Mapping) or not all(isinstance(name, str) for name in data):
            raise ContractBroken("made a task whose data is no dictionary of texts to values.")
        if len(self._open) >= MAX_OPEN:
            raise ContractBroken(f"was asked for more than {MAX_OPEN} episodes at once.")
        environment = self._make()
        opening = plain_answer(environment.reset(**data), "what reset gave")
        self._open[number] = environment
        return opening

    def call(self, number: int, tool: str, arguments: Mapping[str, Any]) -> str:
        """What the model is told."""
        environment = self._open[number]
        try:
            if tool not in self._names:
                raise LookupError(f"no tool is named {tool}; there are {', '.join(self._names)}")
            if hasattr(environment, "tools"):
                result = environment.call_tool(tool, dict(arguments))  # type: ignore[attr-defined]
            else:
                result = getattr(environment, tool)(**arguments)
            text = result if isinstance(result, str) else _json(result)
        except MemoryError:
            raise
        except Exception as error:  # the model learns from it
            text = f"{type(error).__name__}: {error}"
        # The model may have written half of a surrogate pair, and the tool have repeated it.
        return text.encode("utf-8", "replace").decode()

    def reward(self, number: int) -> float | None:
        return plain_reward(self._open[number].get_reward())

    def feedback(self, number: int) -> str | None:
        tell = getattr(self._open[number], "feedback", None)
        return None if tell is None else plain_answer(tell(), "feedback")

    def end(self, number: int) -> None:
        environment = self._open.pop(number)
        close = getattr(environment, "close", None)
        if close is not None:
            close()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
