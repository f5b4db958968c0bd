from __future__ import annotations

import dataclasses
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from edge_node.experience import Answer, ExperienceStore, Feedback, Interaction, Preference, Trimmer
from edge_node.experience.retention import TOMBSTONES
from edge_node.experience.usable import TOO_MUCH, TOO_OLD
from edge_node.experience_settings import ExperienceSettings
from edge_node.problems import Problems

MIB = 1 << 20


def make_interaction(number: int, days_old: float, size: int = 0) -> Interaction:
    at = (datetime.now(UTC) - timedelta(days=days_old)).isoformat()
    messages = [{"role": "user", "content": "secret" + "x" * size}]
    return Interaction(
        f"chatcmpl-{number}", at, "lorikeet@v1", messages, "answer", "stop",
        "/v1/chat/completions", (1, 2), (3, number),
    )  # fmt: skip


def like(store: ExperienceStore, number: int) -> None:
    store.add_feedback(Feedback(f"chatcmpl-{number}", 1.0), max_tokens=99)


def left(store: ExperienceStore) -> list[int]:
    rows = store._query("SELECT id FROM interactions")
    return sorted(int(row["id"].removeprefix("chatcmpl-")) for row in rows)


@pytest.fixture
def store(tmp_path: Path) -> ExperienceStore:
    return ExperienceStore(tmp_path / "experience.db")


def nobody() -> int:
    return 0


def test_what_is_too_old_goes_with_what_was_said_of_it(
    store: ExperienceStore, tmp_path: Path
) -> None:
    store.add_interactions([make_interaction(number, days_old=number) for number in range(1, 7)])
    for number in (2, 5):
        like(store, number)
    pair = Preference(Answer("chatcmpl-1"), Answer("chatcmpl-6"))
    store.add_preference(pair, max_tokens=99)
    assert store.counts().examples == 2
    assert store.remove_older(3.5, nobody) == 3
    assert left(store) == [1, 2, 3]
    counts = store.counts()
    assert (counts.examples, counts.feedback, counts.preferences) == (1, 1, 0)
    assert (store.removed(), store.deleted()) == (3, 0), "rounds are not given up for it"
    assert store.why_removed("chatcmpl-5") == TOO_OLD
    assert store.why_removed("chatcmpl-1") == ""
    assert store.remove_older(3.5, nobody) == 0


def test_what_an_unfinished_round_reads_stays_until_it_has_ended(store: ExperienceStore) -> None:
    store.add_interactions([make_interaction(number, days_old=9) for number in range(1, 7)])
    like(store, 1)
    pair = Preference(Answer("chatcmpl-2"), Answer("chatcmpl-3"))
    store.add_preference(pair, max_tokens=99)
    cursor = store.cursor()
    like(store, 4)
    assert store.remove_older(1, lambda: cursor) == 3
    assert left(store) == [1, 2, 3]
    assert store.remove_beyond(1, lambda: cursor) == 0
    assert store.remove_older(1, nobody) == 3


def test_a_round_that_begins_meanwhile_loses_nothing(store: ExperienceStore) -> None:
    store.add_interactions([make_interaction(1, days_old=9)])
    like(store, 1)
    reads = iter([0, 1])
    assert store.remove_older(1, lambda: next(reads, 1)) == 0
    assert left(store) == [1]


def test_a_file_that_is_too_large_shrinks_and_keeps_what_was_judged_longest(
    store: ExperienceStore, tmp_path: Path
) -> None:
    rows = [make_interaction(number, 9 - number / 100, size=20_000) for number in range(200)]
    store.add_interactions(rows)
    for number in (0, 1):
        like(store, number)
    before = (tmp_path / "experience.db").stat().st_size
    assert before > 4 * MIB
    removed = store.remove_beyond(2 * MIB, nobody)
    size = (tmp_path / "experience.db").stat().st_size
    assert size <= 2 * MIB
    assert store.held_bytes() == size
    assert size > MIB, "not more than it had to"
    assert left(store) == [0, 1, *range(removed + 2, 200)]
    assert store.why_removed("chatcmpl-2") == TOO_MUCH
    assert not (tmp_path / "experience.db-wal").stat().st_size
    assert store.remove_beyond(2 * MIB, nobody) == 0


def test_what_was_removed_cannot_be_read_in_the_file(
    store: ExperienceStore, tmp_path: Path
) -> None:
    row = dataclasses.replace(make_interaction(1, 9), answer="very secret")
    store.add_interactions([row, make_interaction(2, 0)])
    store.remove_older(1, nobody)
    raw = b"".join(file.read_bytes() for file in tmp_path.glob("experience.db*"))
    assert b"very secret" not in raw


def test_tombstones_do_not_grow_for_ever(store: ExperienceStore) -> None:
    with sqlite3.connect(store._path) as db:
        db.executemany(
            "INSERT INTO removed (id, at, why) VALUES (?, '', 'x')",
            ((f"old-{number}",) for number in range(TOMBSTONES)),
        )
    store.add_interactions([make_interaction(number, 9) for number in range(10)])
    store.remove_older(1, nobody)
    assert store._count("SELECT COUNT(*) FROM removed") == TOMBSTONES
    assert store.removed() == TOMBSTONES + 10
    assert store.why_removed("old-0") == ""
    assert store.why_removed("chatcmpl-9") == TOO_OLD


def test_the_trimmer_keeps_both_bounds_and_says_when_it_cannot(
    store: ExperienceStore, tmp_path: Path
) -> None:
    problems, reads = Problems(tmp_path), [0]
    trimmer = Trimmer(
        ExperienceSettings(retention_days=5, max_mib=1), store, lambda: reads[0], problems
    )
    store.add_interactions([make_interaction(number, 1, size=50_000) for number in range(60)])
    store.add_interactions([make_interaction(99, 6)])
    for number in range(60):
        like(store, number)
    reads[0] = store.cursor()
    trimmer.trim()
    assert 99 not in left(store)
    (problem,) = problems.current()
    assert (problem.room, "EDGE_EXPERIENCE__MAX_MIB is 1" in problem.text) == ("retention", True)
    reads[0] = 0
    trimmer.trim()
    assert store.held_bytes() <= MIB
    assert not problems.current()
    store.close()
    store._db = sqlite3.connect(":memory:", check_same_thread=False)  # a damaged file
    trimmer.trim()
    assert "not removed" in problems.current()[0].text


def test_without_bounds_nothing_is_removed(store: ExperienceStore, tmp_path: Path) -> None:
    store.add_interactions([make_interaction(1, 9999)])
    trimmer = Trimmer(ExperienceSettings(), store, nobody, Problems(tmp_path))
    trimmer.prepare()
    trimmer.trim()
    assert left(store) == [1]


def test_a_file_of_earlier_software_shrinks_too(tmp_path: Path) -> None:
    path = tmp_path / "experience.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE something (x)")  # with a page, it is too late for auto_vacuum
        db.execute("DROP TABLE something")
    store = ExperienceStore(path)
    store.add_interactions([make_interaction(number, 9, size=50_000) for number in range(60)])
    assert store._count("PRAGMA auto_vacuum") == 0
    Trimmer(ExperienceSettings(max_mib=1), store, nobody, Problems(tmp_path)).prepare()
    assert store.remove_beyond(MIB, nobody)
    assert path.stat().st_size <= MIB
