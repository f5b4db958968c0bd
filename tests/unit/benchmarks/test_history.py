"""The journal that `benchmarks.history` writes is one that central reads."""

from __future__ import annotations

from pathlib import Path

from benchmarks.history import open_history


def test_every_look_works_on_it(tmp_path: Path) -> None:
    opened = open_history(tmp_path, 30, seed=0)
    opened.take_turn()
    opened.journal.close()
    assert [len(turn) for turn in opened.explain_ms] == [3]
