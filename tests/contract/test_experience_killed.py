"""kill -9 while experience is written or purged: nothing acknowledged is lost or doubled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_node.experience import ExperienceStore, Feedback, Teller
from edge_node.experience.selection import Selection
from tests.unit.edge_node.experience.test_experience_store import make_interaction

ANSWERS = 40
GIVES = """
import sys
from pathlib import Path
from tests.contract.test_experience_killed import give
from edge_node.experience import ExperienceStore
store = ExperienceStore(Path(sys.argv[1]))
for number in range(10**6):
    print(number, give(store, number), flush=True)
"""
PURGES = """
import sys
from pathlib import Path
from edge_node.experience import ExperienceStore
from edge_node.experience.selection import Selection
ExperienceStore(Path(sys.argv[1])).purge(Selection(), lambda count: print(count, flush=True))
"""


def give(store: ExperienceStore, number: int) -> str:
    """One of each kind: a word on an answer that is there, and on one that is under way."""
    under_way = f"chatcmpl-{number % ANSWERS + (ANSWERS if number % 2 else 0)}"
    said = Feedback(under_way, 1.0, comment=str(number))
    teller = Teller(once=str(number), digest=str(number), expects=frozenset({under_way}))
    return store.give(said, max_tokens=99, teller=teller).id


def killed(code: str, path: Path, after_lines: int) -> list[str]:
    """The lines of a process that is killed when it has written so many."""
    lines = []
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if len(lines) == after_lines:
                time.sleep(0.003 * after_lines % 0.02)
                process.send_signal(signal.SIGKILL)
        process.wait()
    return [line for line in lines if line.endswith("\n")]


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "experience.db"
    store = ExperienceStore(path)
    store.add_interactions([make_interaction(number) for number in range(ANSWERS)])
    store.close()
    yield path
    store = ExperienceStore(path)
    assert store._query("PRAGMA integrity_check")[0][0] == "ok"
    assert store._query("PRAGMA foreign_key_check") == []


@pytest.mark.parametrize("after", [3, 20])
def test_feedback_that_was_acknowledged_is_there_once(path: Path, after: int) -> None:
    given = dict(line.split() for line in killed(GIVES, path, after))
    assert len(given) >= after
    store = ExperienceStore(path)
    for number, feedback_id in given.items():
        assert store.feedback(feedback_id).comment == number
        assert give(store, int(number)) == feedback_id, "sent again it is the same"
    store.add_interactions([make_interaction(number) for number in range(ANSWERS, 2 * ANSWERS)])
    assert store.waiting() == 0
    for feedback_id in given.values():
        assert not store.feedback(feedback_id).waits
    # The last one may have been written and not said.
    assert 0 <= store.counts().feedback - len(given) <= 1


def test_a_purge_that_is_killed_goes_on_when_it_is_run_again(path: Path) -> None:
    store = ExperienceStore(path)
    store.add_interactions([make_interaction(number, answer="w" * 500) for number in range(1500)])
    for number in range(0, 1500, 3):
        store.add_feedback(Feedback(f"chatcmpl-{number}", 1.0), max_tokens=999)
    heard = killed(PURGES, path, 2)
    assert len(heard) >= 2
    left = store.count(Selection())
    assert 0 < left < 1500
    assert store.deleted() == 1500 - left, "each has its tombstone"
    assert store.purge(Selection()).interactions == left
    assert (store.counts().interactions, store.counts().feedback, store.deleted()) == (0, 0, 1500)
