"""Checkpoints that can be trusted after a crash.

In: a directory that the trainer has just written. Out: the newest directory whose every file is as it was sealed. A
kill or a power cut can leave half of a checkpoint; the seal is written last, durably, and names each file's digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

SEAL = "sealed.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(checkpoint: Path, elapsed_s: float) -> None:
    """Make `checkpoint` durable and valid; `elapsed_s` is the round's training time so far."""
    digests = {}
    for file in _files(checkpoint):
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
    partial = checkpoint / (SEAL + ".partial")
    with partial.open("w") as stream_out:
        json.dump({"files": digests, "elapsed_s": elapsed_s}, stream_out)
        stream_out.flush()
        os.fsync(stream_out.fileno())
    partial.replace(checkpoint / SEAL)
    for folder in (checkpoint, checkpoint.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def newest_valid(workspace: Path) -> tuple[Path, float] | None:
    """The newest valid checkpoint and its elapsed seconds; every other one is deleted."""
    found = sorted(
        (folder for folder in workspace.glob("checkpoint-*") if _NAME.fullmatch(folder.name)),
        key=lambda folder: int(folder.name.rpartition("-")[2]),
        reverse=True,
    )
    newest: tuple[Path, float] | None = None
    for folder in found:
        elapsed_s = _read(folder) if newest is None else None
        if elapsed_s is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            newest = folder, elapsed_s
    return newest


def _read(checkpoint: Path) -> float | None:
    try:
        document = json.loads((checkpoint / SEAL).read_bytes())
        for name, digest in document["files"].items():
            with (checkpoint / name).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                    return None
        return float(document["elapsed_s"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _files(checkpoint: Path) -> list[Path]:
    return sorted(file for file in checkpoint.iterdir() if file.is_file() and not file.name.startswith(SEAL))
