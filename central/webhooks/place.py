"""How far one address has been told, on disk.

In: a cursor in the journal, problems that wait to be told or stand. Out: the same after a restart.
Guarantee: `write` is durable before it returns. The journal itself is the queue of its events, so
they are neither copied nor lost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from central.disk import make_directory, write_file
from central.errors import StorageError


@dataclass
class Place:
    """sequence, event_hash: the last journal event that was told, or needed no telling.

    waiting: problem messages not told yet, as (id, body). standing: problems that were told.
    """

    sequence: int
    event_hash: str
    waiting: list[tuple[str, str]] = field(default_factory=list)
    standing: dict[str, Mapping[str, Any]] = field(default_factory=dict)


class PlaceFile:
    """`<data dir>/webhooks/<digest of the address>.json`: a name that tells nothing of it."""

    def __init__(self, data_dir: Path, url: str) -> None:
        self._folder = data_dir / "webhooks"
        self._path = self._folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.json"

    def read(self) -> Place | None:
        """None when this address was never told anything; raises StorageError."""
        try:
            document = json.loads(self._path.read_bytes())
            return Place(
                int(document["sequence"]),
                str(document["event_hash"]),
                [(str(known), str(body)) for known, body in document["waiting"]],
                dict(document["standing"]),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{self._path} cannot be read: {error!r}. It says how far a webhook was told. "
                "Delete it: the webhook then goes on with what happens from now on."
            ) from error

    def write(self, place: Place) -> None:
        """Durable when it returns; raises StorageError."""
        make_directory(self._folder)
        write_file(self._path, json.dumps(asdict(place)).encode())
