"""Execution of a call on a small database, and the comparison of what it did.

In: a company's convention, a database of five records, the call as text. Out: the database
afterwards, or a `CallError` whose kind says what was wrong. Standard library only; no answer,
however broken, raises anything else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from examples.quickstart.house import House, Request, draw_ref

RECORDS = 5
Database = dict[str, dict[str, dict[str, Any]]]
"""service -> record reference -> fields (status, site, priority, quantity)."""


class ErrorKind(StrEnum):
    BAD_JSON = "bad json"
    UNKNOWN_SERVICE = "unknown service"
    UNKNOWN_OPERATION = "unknown operation"
    UNKNOWN_RECORD = "unknown record"
    UNKNOWN_SITE = "unknown site"
    BAD_ARGUMENT = "bad argument"
    WRONG_STATE = "wrong state"


class CallError(ValueError):
    """The API refuses the call; `kind` names why."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def new_database(draw: random.Random, request: Request, sites: Sequence[str]) -> Database:
    """Five untouched records of the request's service; the requested record is one of them."""
    refs = {request.ref}
    while len(refs) < RECORDS:
        refs.add(draw_ref(draw))
    records = {
        ref: {"status": "new", "site": draw.choice(sites), "priority": None, "quantity": 1}
        for ref in sorted(refs)
    }
    return {request.service: records}


def execute(
    house: House, services: Sequence[str], database: Mapping[str, Any], call: str
) -> Database:
    """The database after `call`; the given one is not changed."""
    arguments = parse_call(call)
    service = _required(house, arguments, "service", ErrorKind.UNKNOWN_SERVICE)
    if service not in services:
        raise CallError(
            ErrorKind.UNKNOWN_SERVICE, f"{service!r}; expected one of {', '.join(services)}"
        )
    verb = _decode(house, arguments, "verb", ErrorKind.UNKNOWN_OPERATION)
    ref = _required(house, arguments, "ref", ErrorKind.UNKNOWN_RECORD)
    if ref not in database.get(service, {}):
        raise CallError(ErrorKind.UNKNOWN_RECORD, f"{service} has no record {ref!r}")
    change: dict[str, Any] = {
        "status": verb,
        "site": _decode(house, arguments, "site", ErrorKind.UNKNOWN_SITE),
    }
    if house.keys["priority"] in arguments:
        change["priority"] = _decode(house, arguments, "priority", ErrorKind.BAD_ARGUMENT)
    quantity = arguments.pop(house.keys["quantity"], None)
    if quantity is not None:
        if type(quantity) is not int or quantity < 1:
            raise CallError(
                ErrorKind.BAD_ARGUMENT, f"quantity {quantity!r}; expected a whole number above 0"
            )
        change["quantity"] = quantity
    if arguments:
        raise CallError(
            ErrorKind.BAD_ARGUMENT, f"{sorted(arguments)[0]!r} is not an argument of this API"
        )
    after = {
        name: {key: dict(fields) for key, fields in records.items()}
        for name, records in database.items()
    }
    after[service][ref].update(change)
    return after


def check_call(
    house: House, services: Sequence[str], database: Mapping[str, Any], expected: str, call: str
) -> None:
    """Raise CallError unless `call` leaves exactly the database that `expected` leaves."""
    wanted = execute(house, services, database, expected)
    found = execute(house, services, database, call)
    for service, records in wanted.items():
        for ref, fields in records.items():
            for name, value in fields.items():
                seen = found[service][ref][name]
                if seen != value:
                    message = f"record {ref} has {name} {seen!r}; expected {value!r}"
                    raise CallError(ErrorKind.WRONG_STATE, message)


def parse_call(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CallError(
            ErrorKind.BAD_JSON, f"the answer is not one JSON object ({error})"
        ) from error
    if not isinstance(arguments, dict):
        raise CallError(
            ErrorKind.BAD_JSON,
            f"the answer is a JSON {type(arguments).__name__}; expected an object",
        )
    return arguments


def _required(house: House, arguments: dict[str, Any], slot: str, kind: ErrorKind) -> str:
    """Take the slot's argument out of `arguments`."""
    key = house.keys[slot]
    if key not in arguments:
        raise CallError(kind, f"the call has no {key!r}")
    value = arguments.pop(key)
    if not isinstance(value, str):
        raise CallError(kind, f"{key} is {value!r}; expected a string")
    return value


def _decode(house: House, arguments: dict[str, Any], slot: str, kind: ErrorKind) -> str:
    code = _required(house, arguments, slot, kind)
    words = house.words(slot)
    if code not in words:
        raise CallError(kind, f"{house.keys[slot]} {code!r} is not in this company's code book")
    return words[code]
