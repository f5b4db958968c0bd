"""What crosses between a node and the worker of an environment, one JSON line each.

In, at the worker: what a plug-in gave. Out, at the node: tasks, documents and outcomes. Guarantees:
what does not keep the contract is refused at the worker, in words that quote no message and no
answer. A task crosses sealed: only the worker that made it, or another of the same environment,
opens it. So a plug-in gets its own object back, whatever it put into it, and the node opens
nothing.
"""

from __future__ import annotations

import base64
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from edge_node.environments.contract import Document, Outcome, Task

SEALED = "sealed"
"""Key in the `data` of a task at the node."""
MAX_WEIGHT = 1e6
MAX_DIFFICULTY = 1000
SHOWN = 80
"""Characters of a task's id that a message shows."""


class ContractBroken(ValueError):
    """An environment gave what its contract excludes; the message goes on from its name."""


def plain_tasks(made: object, count: int) -> list[dict[str, Any]]:
    """At most `count` distinct tasks as plain values; raises ContractBroken."""
    return _distinct(made, count, "task", _plain_task)


def read_tasks(plain: Sequence[Mapping[str, Any]]) -> list[Task]:
    """The opposite of `plain_tasks`, with sealed data."""
    return [
        Task(
            task["id"],
            task["messages"],
            {SEALED: str(task[SEALED])},
            weight=float(task["weight"]),
            difficulty=task["difficulty"],
        )
        for task in plain
    ]


def plain_documents(made: object, count: int) -> list[dict[str, Any]]:
    """At most `count` distinct documents as plain values; raises ContractBroken."""
    return _distinct(made, count, "document", _plain_document)


def read_documents(plain: Sequence[Mapping[str, Any]]) -> list[Document]:
    """The opposite of `plain_documents`."""
    return [Document(**document) for document in plain]


def open_task(sealed: str) -> Any:
    """The plug-in's own task; only a worker does this."""
    return pickle.loads(base64.b64decode(sealed))


def plain_outcome(outcome: object) -> dict[str, Any]:
    """A verdict as plain values; raises ContractBroken."""
    passed, score = _plain(outcome, "passed"), _plain(outcome, "score")
    reason, correction = _plain(outcome, "reason"), _plain(outcome, "correction")
    if not isinstance(passed, bool):
        raise ContractBroken(f"has a {_kind(passed)} for passed; expected True or False.")
    if not isinstance(score, int | float):
        raise ContractBroken(f"has a {_kind(score)} for score; expected a number from 0 to 1.")
    if not (math.isfinite(score) and 0 <= score <= 1):
        raise ContractBroken(f"has score {score}; expected a number from 0 to 1.")
    if not isinstance(reason, str):
        raise ContractBroken(f"has a {_kind(reason)} for reason; expected a text.")
    return {
        "passed": passed,
        "score": float(score),
        "reason": reason,
        "correction": plain_answer(correction, "correction"),
    }


def read_outcome(plain: Mapping[str, Any]) -> Outcome:
    """The opposite of `plain_outcome`."""
    return Outcome(**plain)


def plain_answer(answer: object, name: str = "reference_answer") -> str | None:
    """A text or None; raises ContractBroken."""
    if not (answer is None or isinstance(answer, str)):
        raise ContractBroken(f"has a {_kind(answer)} for {name}; expected a text or None.")
    if answer is not None:
        _expect_unicode(answer, f"has a {name} that")
    return answer


def plain_reward(reward: object) -> float | None:
    """A number from 0 to 1, or None; raises ContractBroken."""
    value = _number(reward)
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise ContractBroken(f"has a {_kind(value)} for reward; expected 0 to 1, or None.")
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ContractBroken(f"has reward {value}; expected 0 to 1, or None.")
    return float(value)


def read_reward(plain: object) -> float | None:
    """The opposite of `plain_reward`."""
    return None if plain is None else float(plain)  # type: ignore[arg-type]


def read_answer(plain: object) -> str | None:
    """The opposite of `plain_answer`."""
    return None if plain is None else str(plain)


def _distinct(
    made: object, count: int, noun: str, plain: Callable[[object, str], dict[str, Any]]
) -> list[dict[str, Any]]:
    if not isinstance(made, Iterable):
        raise ContractBroken(
            f"gave a {_kind(made)} for {noun}s; expected a sequence of at most {count} {noun}s."
        )
    found: dict[str, dict[str, Any]] = {}
    for number, item in enumerate(islice(made, count + 1)):
        if number == count:
            raise ContractBroken(
                f"gave more {noun}s than it was asked for; expected at most {count}."
            )
        name = getattr(item, "id", None)
        if not isinstance(name, str) or not name:
            raise ContractBroken(
                f"made a {noun} whose id is a {_kind(name)}; expected a text that is not empty."
            )
        _expect_unicode(name, f"made a {noun} whose id")
        if name in found:
            raise ContractBroken(f"gave {noun} {name[:SHOWN]!r} twice; expected distinct ids.")
        found[name] = plain(item, name)
    return list(found.values())


def _plain_document(document: object, name: str) -> dict[str, Any]:
    text = getattr(document, "text", None)
    if not isinstance(text, str) or not text:
        raise ContractBroken(
            f"made document {name[:SHOWN]!r} whose text is a {_kind(text)}; expected a text that "
            "is not empty."
        )
    _expect_unicode(text, f"made document {name[:SHOWN]!r} whose text")
    return {"id": name, "text": text}


def _plain_task(task: object, name: str) -> dict[str, Any]:
    messages = getattr(task, "messages", None)
    where = f"made task {name[:SHOWN]!r}"
    if not isinstance(messages, list | tuple) or not messages:
        raise ContractBroken(f"{where} without messages; expected at least one message.")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ContractBroken(
                f"{where} with a message that has no role or no content; expected both."
            )
        if not all(isinstance(text, str) for item in message.items() for text in item):
            raise ContractBroken(
                f"{where} with a message that is not all text; expected texts in every field."
            )
        for text in message.values():
            _expect_unicode(text, f"{where} with a message that")
    try:
        sealed = base64.b64encode(pickle.dumps(task)).decode()
    except Exception as error:  # pickling runs the plug-in's code
        raise ContractBroken(
            f"{where} with data that cannot be kept ({type(error).__name__} of pickle); expected "
            "plain values: numbers, texts, lists, dictionaries."
        ) from error
    return {
        "id": name,
        "messages": [dict(message) for message in messages],
        SEALED: sealed,
        "weight": _plain_weight(task, where),
        "difficulty": _plain_difficulty(task, where),
    }


def _plain_weight(task: object, where: str) -> float:
    value = _number(getattr(task, "weight", 1.0))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ContractBroken(f"{where} whose weight is a {_kind(value)}; expected a number.")
    if not 0 < value <= MAX_WEIGHT:  # not what is no number either
        raise ContractBroken(
            f"{where} whose weight is {value:g}; expected more than 0, and {MAX_WEIGHT:g} at most."
        )
    return float(value)


def _plain_difficulty(task: object, where: str) -> int | None:
    value = _number(getattr(task, "difficulty", None))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ContractBroken(
            f"{where} whose difficulty is a {_kind(value)}; expected a whole number, or None."
        )
    if not 0 <= value <= MAX_DIFFICULTY:
        raise ContractBroken(
            f"{where} whose difficulty is out of range; expected 0 to {MAX_DIFFICULTY}."
        )
    return int(value)


def _expect_unicode(text: str, where: str) -> None:
    """A request to vLLM is UTF-8, which has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ContractBroken(
            f"{where} has half of a surrogate pair at character {error.start}; expected Unicode "
            "text. Read it with errors='replace'."
        ) from None


def _plain(outcome: object, name: str) -> Any:
    if not hasattr(outcome, name):
        raise ContractBroken(
            f"gave a {_kind(outcome)} without {name}; expected passed, score, reason and "
            "correction."
        )
    return _number(getattr(outcome, name))


def _number(value: Any) -> Any:
    """A number of numpy or torch becomes one of Python; another value stays."""
    return value.item() if hasattr(value, "item") else value


def _kind(value: object) -> str:
    return type(value).__name__
