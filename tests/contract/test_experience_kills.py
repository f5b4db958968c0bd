"""`kill -9` of processes that write, remove and encrypt in one experience store."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_node.experience import ExperienceStore
from edge_node.experience.sealing import MAGIC, Sealing

KEYS = (b"k" * 32, b"o" * 32)
CHILD = """
import sys, itertools, threading
from datetime import UTC, datetime
from pathlib import Path
from edge_node.experience import ExperienceStore, Feedback, Interaction
from edge_node.experience.sealing import Sealing

work, path, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
keys = [bytes.fromhex(key) for key in sys.argv[4:]]
store = ExperienceStore(path, sealing=Sealing(keys))
print("ready", flush=True)
for number in itertools.count(first):
    if work == "write":
        now = datetime.now(UTC).isoformat()
        row = Interaction(f"i-{number}", now, "m", [{"role": "user", "content": "secret" * 900}],
                          "secret", "stop", "/v1", (1, 2), (3, 4))
        store.add_interactions([row])
        if number % 2:
            store.add_feedback(Feedback(row.id, 1.0, comment="secret"), max_tokens=99)
        print(row.id, flush=True)
    elif work == "remove":
        store.remove_beyond(1 << 20, lambda: 0)
    else:
        store.reseal()
"""


def start(work: str, path: Path, first: int, *keys: bytes) -> subprocess.Popen[str]:
    arguments = [work, str(path), str(first), *(key.hex() for key in keys)]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.slow
def test_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path, random_ = tmp_path / "experience.db", random.Random(0)
    acknowledged: list[str] = []
    first = 0
    for turn in range(5):
        keys = KEYS if turn % 2 else KEYS[::-1]
        children = [start(work, path, first, *keys) for work in ("write", "remove", "reseal")]
        time.sleep(random_.uniform(0.2, 0.8))
        for child in children:
            child.send_signal(signal.SIGKILL)
        said = children[0].communicate()[0].splitlines()
        for child in children[1:]:
            child.communicate()
        acknowledged += said
        first += len(said) + 1  # the last one may be there without its acknowledgement
        with sqlite3.connect(path) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert not db.execute("PRAGMA foreign_key_check").fetchall()
            there = {row[0] for row in db.execute("SELECT id FROM interactions")}
            gone = {row[0] for row in db.execute("SELECT id FROM removed")}
            sealed = {row[0][: len(MAGIC)] for row in db.execute("SELECT answer FROM interactions")}
            assert set(acknowledged) <= there | gone
            assert not there & gone
            assert sealed <= {MAGIC}
        db.close()
        store = ExperienceStore(path, sealing=Sealing(keys))
        for interaction_id in there:
            kept = store.interaction(interaction_id)
            assert kept is not None
            assert kept.answer == "secret"
        store.close()
    assert len(acknowledged) > 20
    assert gone, "something was removed"
    store = ExperienceStore(path, sealing=Sealing(KEYS))
    store.reseal()
    store.remove_beyond(1 << 20, lambda: 0)
    store.close()
    raw = b"".join(file.read_bytes() for file in tmp_path.glob("experience.db*"))
    assert b"secret" not in raw
    alone = ExperienceStore(path, sealing=Sealing(KEYS[:1]))
    assert alone.counts().interactions


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_encryption_goes_on(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "experience.db"
    writer = start("write", path, 0)
    time.sleep(1)
    writer.kill()
    writer.communicate()
    with sqlite3.connect(path) as db:
        before = db.execute("SELECT COUNT(*) FROM interactions").fetchone()
    db.close()
    for turn in range(3):
        child = start("reseal", path, 0, KEYS[0])
        time.sleep(random.Random(seed * 10 + turn).uniform(0, 0.05))
        child.kill()
        child.communicate()
    store = ExperienceStore(path, sealing=Sealing(KEYS[:1]))
    store.reseal()
    assert store._count("SELECT COUNT(*) FROM interactions") == before[0]
    assert len(store.examples(up_to=10**9, limit=10**6)) >= before[0] // 2 - 1
    store.close()
    raw = b"".join(file.read_bytes() for file in tmp_path.glob("experience.db*"))
    assert b"secret" not in raw
