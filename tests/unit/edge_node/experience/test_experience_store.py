from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest

from edge_node.errors import StorageError, UnknownInteraction
from edge_node.experience import ExperienceStore, Feedback, Interaction


def make_interaction(number: int, *, answer: str = "wrong", model: str = "lorikeet@v1-aaaaaaaa") -> Interaction:
    return Interaction(
        id=f"chatcmpl-{number}",
        created_at="2026-11-22T12:00:00+00:00",
        model=model,
        messages=[{"role": "user", "content": f"question {number} ü"}],
        answer=answer,
        finish_reason="stop",
        endpoint="/v1/chat/completions",
    )


@pytest.fixture
def store(tmp_path: Path) -> ExperienceStore:
    return ExperienceStore(tmp_path / "experience.db")


def test_another_process_sees_what_was_acknowledged(store: ExperienceStore, tmp_path: Path) -> None:
    store.add_interactions([make_interaction(1), make_interaction(2)])
    other = ExperienceStore(tmp_path / "experience.db")
    assert other.interaction("chatcmpl-2") == make_interaction(2)
    assert other.interaction("chatcmpl-3") is None
    other.add_feedback(Feedback("chatcmpl-1", score=0.0))
    assert store.cursor() == 1


def test_writes_are_synced_before_they_return(store: ExperienceStore) -> None:
    assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_an_interaction_is_stored_once(store: ExperienceStore) -> None:
    store.add_interactions([make_interaction(1)])
    store.add_interactions([make_interaction(1, answer="another"), make_interaction(2)])
    assert store.counts().interactions == 2
    first = store.interaction("chatcmpl-1")
    assert first is not None
    assert first.answer == "wrong"


def test_feedback_needs_an_interaction(store: ExperienceStore) -> None:
    with pytest.raises(UnknownInteraction, match="chatcmpl-9"):
        store.add_feedback(Feedback("chatcmpl-9", score=1.0))
    assert store.counts().feedback == 0


def test_repeated_feedback_changes_nothing(store: ExperienceStore) -> None:
    store.add_interactions([make_interaction(1)])
    first = store.add_feedback(Feedback("chatcmpl-1", score=0.0, correction="right"))
    assert store.add_feedback(Feedback("chatcmpl-1", score=0.0, correction="right")) == first
    assert store.cursor() == 1
    assert store.add_feedback(Feedback("chatcmpl-1", score=1.0)) != first
    assert store.cursor() == 2


def test_examples_are_corrections_and_verified_answers_newest_first(store: ExperienceStore) -> None:
    store.add_interactions([make_interaction(number, answer=f"answer {number}") for number in range(1, 5)])
    store.add_interactions([make_interaction(5, answer="")])
    store.add_feedback(Feedback("chatcmpl-1", score=1.0))
    store.add_feedback(Feedback("chatcmpl-2", score=0.0, correction="right"))
    store.add_feedback(Feedback("chatcmpl-3", score=0.5))
    store.add_feedback(Feedback("chatcmpl-4", comment="nice"))
    store.add_feedback(Feedback("chatcmpl-5", score=1.0))
    examples = store.examples(up_to=store.cursor(), limit=10)
    assert [(example.interaction_id, example.target, example.source) for example in examples] == [
        ("chatcmpl-2", "right", "correction"),
        ("chatcmpl-1", "answer 1", "verified"),
    ]
    assert examples[0].messages == make_interaction(2).messages
    assert store.counts().examples == 2
    assert len(store.examples(up_to=store.cursor(), limit=1)) == 1


def test_the_newest_verdict_wins_and_a_comment_is_none(store: ExperienceStore) -> None:
    store.add_interactions([make_interaction(1)])
    store.add_feedback(Feedback("chatcmpl-1", correction="first"))
    store.add_feedback(Feedback("chatcmpl-1", correction="second"))
    store.add_feedback(Feedback("chatcmpl-1", comment="thanks"))
    assert [example.target for example in store.examples(up_to=3, limit=9)] == ["second"]
    assert [example.target for example in store.examples(up_to=1, limit=9)] == ["first"]
    store.add_feedback(Feedback("chatcmpl-1", score=0.0))
    assert store.examples(up_to=4, limit=9) == []


def test_failures_are_counted_after_a_cursor_and_by_version(store: ExperienceStore) -> None:
    store.add_interactions(
        [make_interaction(1), make_interaction(2, model="lorikeet@v2-bbbbbbbb"), make_interaction(3)]
    )
    store.add_feedback(Feedback("chatcmpl-1", score=0.0))
    cursor = store.cursor()
    store.add_feedback(Feedback("chatcmpl-2", score=1.0, correction="better"))
    store.add_feedback(Feedback("chatcmpl-3", score=1.0))
    assert store.failures(after=0) == 2
    assert store.failures(after=cursor) == 1
    assert store.failures(after=0, model="lorikeet@v1-aaaaaaaa") == 1
    assert store.failures(after=cursor, model="lorikeet@v1-aaaaaaaa") == 0
    assert store.judged(after=0, model="lorikeet@v1-aaaaaaaa") == 2
    assert store.judged(after=cursor, model="lorikeet@v1-aaaaaaaa") == 1


def test_a_path_that_cannot_be_used_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="EDGE_DATA_DIR"):
        ExperienceStore(tmp_path / "file" / "experience.db")


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "experience.db") as db:
        db.execute("PRAGMA user_version=7")
    with pytest.raises(StorageError, match="schema 7"):
        ExperienceStore(tmp_path / "experience.db")


def test_counting_what_is_new_equals_counting_everything(tmp_path: Path) -> None:
    store = ExperienceStore(tmp_path / "experience.db")
    store.add_interactions([make_interaction(number, answer="a" if number else "") for number in range(6)])
    drawn = random.Random(0)
    for _ in range(60):
        score, correction = drawn.choice([(None, "b"), (1.0, None), (0.0, None), (0.0, "c"), (None, None)])
        remark = str(drawn.random())
        store.add_feedback(Feedback(f"chatcmpl-{drawn.randrange(6)}", score, correction, remark))
        expected = len(store.examples(up_to=store.cursor(), limit=100))
        assert store.counts().examples == expected
        assert ExperienceStore(tmp_path / "experience.db").counts().examples == expected
