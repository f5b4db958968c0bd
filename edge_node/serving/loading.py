"""Which adapter vLLM is loading, for the supervisor that finds vLLM dead.

In: names, in vLLM's process. Out: the one whose load has not ended. Guarantee: nothing raises; a
full disk costs this note, not the load.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

FILE_NAME = "loading"


def note_loading(data_dir: Path, name: str) -> None:
    """vLLM begins to load the version `name`."""
    with suppress(OSError):
        (data_dir / FILE_NAME).write_text(name)


def forget_loading(data_dir: Path) -> None:
    """The load is over, or another vLLM starts."""
    with suppress(OSError):
        (data_dir / FILE_NAME).unlink()


def read_loading(data_dir: Path) -> str | None:
    """The version that vLLM was loading when it ended; None: no load was under way."""
    try:
        return (data_dir / FILE_NAME).read_text() or None
    except (OSError, ValueError):
        return None
