"""Files of the node: written durably, and read with an eye for what is damaged.

In: bytes, or a path. Out: the file on disk, or a StorageError that names the path; a JSON document.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_node.errors import StorageError
from lorikeet import durable


def write_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Put `data` at `path` durably and make its folder when it is absent; raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_file(path, data, mode)
    except OSError as error:
        raise StorageError(
            f"Cannot write {path}: {error.strerror or error}. "
            "EDGE_DATA_DIR must be a writable directory with free space."
        ) from error


def read_json(path: Path) -> Any:
    """The JSON document in a file; raises OSError, and ValueError as `parse_json` does."""
    return parse_json(path.read_bytes())


def parse_json(data: bytes) -> Any:
    """A JSON document whose texts can be printed and written.

    Raises ValueError for what is no JSON, is nested too deeply for Python, or has half a surrogate
    pair in a text.
    """
    try:
        document = json.loads(data)
        json.dumps(document, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    return document
