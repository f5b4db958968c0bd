"""One figure with its labels, as it goes from the supervisor to vLLM's process.

In: numbers. Out: JSON values and back. Guarantees: what does not fit raises ValueError; nothing of
Prometheus is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

PREFIX = "lorikeet_node_"


@dataclass(frozen=True)
class Family:
    """name: with PREFIX and unit. text: what it says. samples: label values -> value."""

    name: str
    kind: Literal["gauge", "counter"]
    text: str
    labels: tuple[str, ...]
    samples: tuple[tuple[tuple[str, ...], float], ...]

    @classmethod
    def read(cls, document: Any) -> Family:
        """The inverse of `asdict`; raises ValueError."""
        try:
            family = cls(
                str(document["name"]),
                document["kind"],
                str(document["text"]),
                tuple(map(str, document["labels"])),
                tuple(
                    (tuple(map(str, values)), float(number))
                    for values, number in document["samples"]
                ),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"a family of figures is malformed: {error!r}") from error
        if (
            family.kind not in ("gauge", "counter")
            or not family.name.startswith(PREFIX)
            or any(len(values) != len(family.labels) for values, _ in family.samples)
        ):
            raise ValueError(f"family {family.name!r} is malformed")
        return family

    def document(self) -> dict[str, Any]:
        """As JSON takes it: a number that is not finite has no sample."""
        return asdict(self) | {
            "samples": [one for one in self.samples if math.isfinite(one[1])],
        }


def gauge(
    name: str, text: str, value: float | Mapping[str, float] | None, *labels: str
) -> list[Family]:
    """`value` by the values of one label, or of none; None or no value: no figure."""
    return _family("gauge", name, text, value, labels)


def counter(
    name: str, text: str, value: float | Mapping[str, float] | None, *labels: str
) -> list[Family]:
    """As `gauge`, of what only grows; the name ends in _total."""
    return _family("counter", name, text, value, labels)


def _family(
    kind: Literal["gauge", "counter"],
    name: str,
    text: str,
    value: float | Mapping[str, float] | None,
    labels: tuple[str, ...],
) -> list[Family]:
    if value is None:
        return []
    samples: list[tuple[tuple[str, ...], float]] = (
        [((key,), float(number)) for key, number in value.items()]
        if isinstance(value, Mapping)
        else [((), float(value))]
    )
    return [Family(PREFIX + name, kind, text, labels, tuple(samples))]
