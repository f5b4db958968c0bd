"""What a client says of a request in headers of ours: its episode and its environment.

In: headers. Out: labels for capture. Guarantees: a label that cannot be kept is an Unreadable that
names the header and what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from reprlib import repr  # the value seen, cut short

from edge_node.serving.refusals import Unreadable

EPISODE_HEADER = b"x-lorikeet-episode"
ENVIRONMENT_HEADER = b"x-lorikeet-environment"
LABEL = re.compile(rb"[\x21-\x7e]{1,128}")
EXPECTED = "1 to 128 printable ASCII characters without spaces"


@dataclass(frozen=True)
class Labels:
    """None: the client did not say."""

    episode: str | None = None
    environment: str | None = None


def read_labels(headers: Iterable[tuple[bytes, bytes]]) -> Labels:
    """Raises Unreadable."""
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name in (EPISODE_HEADER, ENVIRONMENT_HEADER):
            if LABEL.fullmatch(value) is None:
                seen = repr(value.decode("latin-1"))
                raise Unreadable(f"The header {name.decode()} is {seen}; expected {EXPECTED}.")
            found[name] = value.decode()
    return Labels(found.get(EPISODE_HEADER), found.get(ENVIRONMENT_HEADER))
