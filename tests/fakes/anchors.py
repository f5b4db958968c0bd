"""Anchors of the tiny model, as `edge-node anchors make` writes them.

In: a directory. Out: the directory with a few samples of each kind. The tiny model answers no
question right by chance: the right answer is what it says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_node.settings import EdgeSettings
from tests.fakes.tiny_model import tiny_model


@contextmanager
def no_bar(steps: int) -> Iterator[Callable[[int], None]]:
    """Shows nothing."""
    yield lambda done: None


def make_tiny_anchors(out: Path, base: Path | None = None, **changes: Any) -> Path:
    """Anchors in `out`, 4 plain, 3 open and 2 qa; `changes` are arguments of make_anchors."""
    from edge_node.learning.make_anchors import make_anchors

    settings = EdgeSettings.model_validate(
        {"data_dir": out.parent / "no-data", "base": {"path": base or tiny_model()}}
    )
    made: dict[str, Any] = {
        "seed": 0,
        "plain": 4,
        "open_file": lines(out, "open", [{"question": f"w{n} w{n + 1}"} for n in range(3)]),
        "qa_file": lines(out, "qa", [{"question": f"w{n}", "answers": ANY} for n in (7, 8)]),
        "bar": no_bar,
    }
    make_anchors(settings, out, **made | changes)
    return out


def lines(out: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """A file of JSON lines beside `out`."""
    file = out.with_name(f"{out.name}-{name}.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


ANY = [f"w{number}" for number in range(240)]
"""Some word is in every answer."""
