"""A file of schema 3, as its software left it, is read by today's."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from edge_node.errors import StorageError
from edge_node.experience import ExperienceStore, Feedback, Group, Thumb
from edge_node.experience.schema import OLDEST, SCHEMA_VERSION
from edge_node.experience.selection import Selection
from tests.unit.edge_node.experience.test_removal import make

GOLDEN = Path(__file__).parents[3] / "golden/0.1.0/experience/version3.db"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(shutil.copy(GOLDEN, tmp_path / "experience.db"))


def version(path: Path) -> int:
    with sqlite3.connect(path) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def test_what_version_3_stored_is_there_and_counts_by_todays_rule(path: Path) -> None:
    assert version(path) == 3
    store = ExperienceStore(path)
    assert (version(path), store.cursor(), store.deleted()) == (SCHEMA_VERSION, 7, 1)
    counts = store.counts()
    assert (counts.interactions, counts.feedback) == (5, 7)
    assert (counts.examples, counts.liked, counts.disliked) == (2, 1, 1)
    by_source = {example.source: example for example in store.examples(up_to=7, limit=9)}
    corrected = by_source["correction"]  # a thumb after it undid it in version 3
    assert (corrected.interaction_id, corrected.target_ids) == ("chatcmpl-1", (5, 6))
    assert by_source["verified"].interaction_id == "chatcmpl-3"
    prompt = (1, 2**17)
    assert store.thumbs(up_to=7, limit=9)[1:] == [Thumb(prompt, (3, 4), False)]
    (pair,) = store.pairs(up_to=7, limit=9)
    assert (pair.chosen_ids, pair.rejected_ids) == ((3, 4), (7, 4))
    logprobs = ((-0.5, -0.25), (-1.5, -0.125))
    assert store.groups(up_to=7, limit=9, model="lorikeet@v1-aaaaaaaa") == [
        Group("chatcmpl-4", prompt, ((3, 4), (7, 4)), logprobs, (0.25, 1.0))
    ]


def test_its_feedback_has_a_kind_and_can_be_read_back_and_taken_back(path: Path) -> None:
    store = ExperienceStore(path)
    (kinds,) = store.by_environment()
    assert kinds.feedback == {
        "comment": 1, "correction": 1, "group": 1, "preference": 1, "score": 3,
    }  # fmt: skip
    told = store.said_of("chatcmpl-1")
    assert [one.kind for one in told] == ["correction", "score", "preference"]
    store.withdraw(told[0].id)
    assert store.verdict("chatcmpl-1") == "liked"


def test_its_disk_is_freed_though_it_could_not_give_back_pages(path: Path) -> None:
    store = ExperienceStore(path)
    store.add_interactions([make(number) for number in range(7, 300)])
    store._truncate_log()
    before = path.stat().st_size
    assert store.purge(Selection()).interactions == 5 + 293
    assert path.stat().st_size < before / 2
    assert store.counts().interactions == 0


def test_an_upgrade_that_is_killed_leaves_version_3(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE withdrawn (id)")  # the last step of the upgrade will fail
    with pytest.raises(StorageError, match="cannot be opened"):
        ExperienceStore(path)
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE withdrawn")
        assert not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'waiting'").fetchall()
    assert version(path) == 3
    assert ExperienceStore(path).counts().interactions == 5


@pytest.mark.parametrize("unknown", [OLDEST - 1, SCHEMA_VERSION + 1])
def test_other_versions_are_refused(tmp_path: Path, unknown: int) -> None:
    with sqlite3.connect(tmp_path / "experience.db") as db:
        db.execute(f"PRAGMA user_version={unknown}")
    with pytest.raises(StorageError, match=f"schema {unknown}; this software reads schemas 2 to"):
        ExperienceStore(tmp_path / "experience.db")


def test_both_processes_may_upgrade_it(path: Path) -> None:
    first, second = ExperienceStore(path), ExperienceStore(path)
    said = Feedback("chatcmpl-2", comment="later")
    first.add_feedback(said, max_tokens=9)
    assert second.counts().feedback == 8
