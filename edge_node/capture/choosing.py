"""Which answers are kept, and how feedback on the others is answered.

In: settings, the access key and the headers of a request. Out: why its answer is not kept, or
nothing; an id for such an answer. Guarantees: the id itself says why, so nothing is stored about an
answer that is not kept, and feedback on it is answered rightly for ever.
"""

from __future__ import annotations

import random
import re
import uuid
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from edge_node.experience_settings import CaptureSettings

CAPTURE_HEADER = b"x-lorikeet-capture"
EPISODE_HEADER = b"x-lorikeet-episode"
REASONS = {
    "node": "this node keeps no answers (EDGE_CAPTURE__ENABLED)",
    "key": "answers to this access key are not kept",
    "request": "the request said that its answer is not to be kept",
    "sample": "this answer is not in the sample that is kept (EDGE_CAPTURE__SAMPLE)",
}
"""Why an answer is not kept -> what feedback on it says."""
_UNKEPT = re.compile(rf"(?:^|[-_])unkept-({'|'.join(REASONS)})-[0-9a-f]{{32}}")
_SCALE = 1 << 32


class KeyLike(Protocol):
    """Of an access key: whether answers to it may be kept."""

    @property
    def capture(self) -> bool: ...


def is_kept(
    settings: CaptureSettings,
    key: KeyLike | None,
    scope: Mapping[str, Any],
    request: dict[str, Any],
) -> bool:
    """Whether the answer is to be kept. If not, `request` gets an id that says why.

    Args:
        key: the access key that it came with.
        scope: of ASGI, with its path and headers.
        request: its body, of whose `request_id` vLLM makes the answer's id; on some routes of the
            header x-request-id, which the caller sets to the same.
    """
    why = _why_not(settings, key, scope["headers"])
    if why:
        begins = "resp_" if scope["path"] == "/v1/responses" else ""  # where vLLM adds nothing
        request["request_id"] = f"{begins}unkept-{why}-{uuid.uuid4().hex}"
    return not why


def _why_not(
    settings: CaptureSettings, key: KeyLike | None, headers: Iterable[tuple[bytes, bytes]]
) -> str:
    """A key of REASONS; empty for an answer that is kept."""
    if not settings.enabled:
        return "node"
    if key is not None and not key.capture:
        return "key"
    episode = None
    for name, value in headers:
        if name == CAPTURE_HEADER and value.strip().lower() == b"off":
            return "request"
        if name == EPISODE_HEADER:
            episode = value
    return "" if _is_drawn(settings, episode) else "sample"


def _is_drawn(settings: CaptureSettings, episode: bytes | None) -> bool:
    drawn = random.random() if episode is None else zlib.crc32(episode) / _SCALE
    return drawn < settings.sample or settings.sample == 1


def reason_of_episode(settings: CaptureSettings, episode: str) -> str:
    """Why no answer of the episode is kept, as far as the settings say; empty if they do not."""
    if not settings.enabled:
        return REASONS["node"]
    return "" if _is_drawn(settings, episode.encode()) else REASONS["sample"]


def reason_of(interaction_id: str) -> str:
    """Why the answer with this id was not kept; empty for another id."""
    found = _UNKEPT.search(interaction_id)
    return REASONS[found.group(1)] if found else ""
