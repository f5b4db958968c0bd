"""Settings of what the node keeps of requests and feedback: groups `capture` and `experience`.

In: EDGE_CAPTURE__* and EDGE_EXPERIENCE__*. Imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from edge_node.serving_settings import Group


class CaptureSettings(Group):
    enabled: bool = True
    """Off: answers are served but nothing is kept; feedback on them is answered `usable: false`."""
    sample: float = Field(default=1.0, ge=0, le=1)
    """Share of answers that is kept, drawn at random. An episode (header `x-lorikeet-episode`) is
    kept whole or not at all.
    """
    redaction: str = Field(
        default="default", pattern=r"^(default|off|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$"
    )
    """What is taken out before anything is written. default: e-mail addresses, phone and card
    numbers, IBANs, keys and tokens, as far as patterns find them. off: nothing. `module:factory`: a
    redactor of your own (docs/privacy.md).
    """
    queue_size: int = Field(default=10_000, ge=1)
    """Finished answers that may wait for the disk; further ones are counted as lost."""
    durable_timeout_s: float = Field(default=5, gt=0)
    """How long an answer's end waits for the disk. After that, the interaction is lost."""


class ExperienceSettings(Group):
    retention_days: float | None = Field(default=None, gt=0)
    """Answers older than this are removed with their feedback. Unset: age removes nothing."""
    max_mib: int | None = Field(default=None, ge=1)
    """Most MiB that experience.db holds. Beyond it, the oldest answers are removed, those without
    feedback first. Unset: no bound.
    """
    key_file: Path | None = None
    """File with a key that encrypts texts and token ids on disk: 64 hex digits, as `openssl rand
    -hex 32` makes them. More lines are older keys, which only decrypt. Unset: nothing is encrypted.
    """
