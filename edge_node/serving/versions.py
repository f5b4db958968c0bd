"""Which version answers a request for the alias, and how each version does.

In: the alias table, access keys, the share of the canary, the policy of the node's own adapter.
Out: the exact version for a request, and counts by version since vLLM's start. Guarantees: one key,
or one user of it, gets the same version from all its requests while the canary stays the same; a
request that names a version gets that one.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edge_node.access import Key
from edge_node.releases_settings import ReleasesSettings
from edge_node.serving.aliases import AliasTable


@dataclass
class Counts:
    """Of one version. errors: answers of status 500 and above, and broken ones. seconds: of all."""

    requests: int = 0
    errors: int = 0
    seconds: float = 0.0


@dataclass
class Answer:
    """One answer on its way. status: of HTTP, once it is known. counted: it is a client's."""

    version: str
    began: float
    counted: bool = True
    status: int = 500


class Versions:
    """One per serving process; lives on the server's event loop."""

    def __init__(
        self,
        aliases: AliasTable,
        settings: ReleasesSettings,
        *,
        chance: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`chance`: a number from [0, 1) for a request that nobody is known to have sent."""
        self._aliases = aliases
        self._share = settings.canary_share
        self._serve = settings.serve
        self._serve_keys = settings.serve_keys
        self._keys = frozenset(settings.canary_keys)
        self._chance = chance
        self._clock = clock
        self._counts: dict[str, Counts] = {}

    def choose(self, model: str | None, key: Key | None, user: Any = None) -> str | None:
        """Exact version for a request that names `model`; None: the alias points nowhere yet.

        `user`: what the request itself calls its user. The user of the key counts before it.
        """
        canary, own, name = self._aliases.canary, self._aliases.own, key.name if key else ""
        if model not in (None, "", self._aliases.alias):
            return self._aliases.resolve(model)
        if canary is not None and name in self._keys:
            return canary
        if own is not None and self._serve_keys.get(name, self._serve) == "best":
            return own
        if canary is None:
            return self._aliases.target
        who = (key and key.user) or (user if isinstance(user, str) else "") or name
        chance = _of(canary, who) if who else self._chance()
        return canary if chance < self._share else self._aliases.target

    def enter(self, name: str, *, counted: bool = True) -> Answer:
        """An answer of version `name` begins; the version stays until `leave`.

        `counted`: False for the node's own requests, which say nothing of what clients get.
        """
        self._aliases.enter(name)
        return Answer(name, self._clock(), counted)

    def leave(self, answer: Answer) -> None:
        """It is over, however it ended."""
        self._aliases.leave(answer.version)
        # A client may name anything; what is not served is not counted.
        if not answer.counted or not self._aliases.knows(answer.version):
            return
        counts = self._counts.setdefault(answer.version, Counts())
        counts.requests += 1
        counts.errors += answer.status >= 500
        counts.seconds += self._clock() - answer.began

    def counts(self) -> dict[str, dict[str, float]]:
        """By version, of those that are still loaded."""
        known = {self._aliases.base, *self._aliases.public}
        self._counts = {name: count for name, count in self._counts.items() if name in known}
        return {name: asdict(count) for name, count in sorted(self._counts.items())}


def said_by(request: Mapping[str, Any]) -> Any:
    """What a request calls its user, in OpenAI's field or in Anthropic's."""
    metadata = request.get("metadata")
    other = metadata.get("user_id") if isinstance(metadata, dict) else None
    return request.get("user") or other


def _of(canary: str, who: str) -> float:
    """The same number from [0, 1) each time; other canaries meet other users first."""
    digest = hashlib.sha256(f"{canary}\n{who}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
