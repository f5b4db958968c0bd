from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest

from edge_node.errors import StorageError, UnknownInteraction
from edge_node.experience import Counts, ExperienceStore, Feedback, Interaction, Receipt

MAX_TOKENS = 12
TOO_LONG = "prompt and answer together have more than 12 tokens"


def make_interaction(
    number: int, *, answer: str = "wrong", model: str = "lorikeet@v1-aaaaaaaa", unusable: str = ""
) -> Interaction:
    return Interaction(
        id=f"chatcmpl-{number}",
        created_at="2026-11-22T12:00:00+00:00",
        model=model,
        messages=[{"role": "user", "content": f"question {number} ü"}],
        answer=answer,
        finish_reason="stop",
        endpoint="/v1/chat/completions",
        prompt_ids=(number, 2**17 + number),
        answer_ids=tuple(map(ord, answer)),
        unusable=unusable,
    )


def tell(
    store: ExperienceStore,
    number: int,
    score: float | None = None,
    right: str | None = None,
    remark: str | None = None,
) -> Receipt:
    ids = () if right is None else tuple(map(ord, right))
    return store.add_feedback(
        Feedback(f"chatcmpl-{number}", score, right, remark, ids), max_tokens=MAX_TOKENS
    )


@pytest.fixture
def store(tmp_path: Path) -> ExperienceStore:
    return ExperienceStore(tmp_path / "experience.db")


def test_another_process_sees_what_was_acknowledged(store: ExperienceStore, tmp_path: Path) -> None:
    store.add_interactions([make_interaction(1), make_interaction(2)])
    other = ExperienceStore(tmp_path / "experience.db")
    assert other.interaction("chatcmpl-2") == make_interaction(2)
    assert other.interaction("chatcmpl-3") is None
    tell(other, 1, score=0.0)
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
        tell(store, 9, score=1.0)
    assert store.counts().feedback == 0


def test_repeated_feedback_changes_nothing(store: ExperienceStore) -> None:
    store.add_interactions([make_interaction(1)])
    first = tell(store, 1, score=0.0, right="right")
    assert tell(store, 1, score=0.0, right="right") == first
    assert store.cursor() == 1
    assert tell(store, 1, score=1.0) != first
    longer = Feedback("chatcmpl-1", correction="right", correction_ids=tuple(range(90)))
    receipts = [store.add_feedback(longer, max_tokens=limit) for limit in (50, 100, 100)]
    assert [bool(receipt.unusable) for receipt in receipts] == [True, False, False]
    assert len({receipt.id for receipt in receipts}) == 2, (
        "where the node can learn it now, it is news"
    )
    assert store.cursor() == 4


def test_examples_are_corrections_and_verified_answers_newest_first(store: ExperienceStore) -> None:
    store.add_interactions(
        [make_interaction(number, answer=f"answer {number}") for number in range(1, 5)]
    )
    store.add_interactions([make_interaction(5, answer="")])
    tell(store, 1, score=1.0)
    tell(store, 2, score=0.0, right="right")
    tell(store, 3, score=0.5)
    tell(store, 4, remark="nice")
    tell(store, 5, score=1.0)
    examples = store.examples(up_to=store.cursor(), limit=10)
    assert [(e.interaction_id, "".join(map(chr, e.target_ids)), e.source) for e in examples] == [
        ("chatcmpl-2", "right", "correction"),
        ("chatcmpl-1", "answer 1", "verified"),
    ]
    assert examples[0].prompt_ids == make_interaction(2).prompt_ids
    assert store.counts() == Counts(5, 5, 2, {"the answer has no tokens": 1}, liked=1)
    assert len(store.examples(up_to=store.cursor(), limit=1)) == 1


def test_the_newest_correction_wins_and_a_comment_is_none(store: ExperienceStore) -> None:
    store.add_interactions([make_interaction(1)])
    tell(store, 1, right="first")
    tell(store, 1, right="second")
    tell(store, 1, remark="thanks")
    assert [
        "".join(map(chr, example.target_ids)) for example in store.examples(up_to=3, limit=9)
    ] == ["second"]
    assert [
        "".join(map(chr, example.target_ids)) for example in store.examples(up_to=1, limit=9)
    ] == ["first"]


def test_failures_are_counted_after_a_cursor_and_by_version(store: ExperienceStore) -> None:
    store.add_interactions(
        [
            make_interaction(1),
            make_interaction(2, model="lorikeet@v2-bbbbbbbb"),
            make_interaction(3),
        ]
    )
    tell(store, 1, score=0.0)
    cursor = store.cursor()
    tell(store, 2, score=1.0, right="better")
    tell(store, 3, score=1.0)
    assert store.failures(after=0) == 2
    assert store.failures(after=cursor) == 1
    assert store.failures(after=0, model="lorikeet@v1-aaaaaaaa") == 1
    assert store.failures(after=cursor, model="lorikeet@v1-aaaaaaaa") == 0
    assert store.judged(after=0, model="lorikeet@v1-aaaaaaaa") == 2
    assert store.judged(after=cursor, model="lorikeet@v1-aaaaaaaa") == 1


def test_what_cannot_be_learnt_is_no_example_and_no_failure(store: ExperienceStore) -> None:
    store.add_interactions(
        [make_interaction(1), make_interaction(2, unusable="the prompt holds more than text")]
    )
    assert tell(store, 1, right="0123456789").unusable == "", (
        "two of the prompt and ten are just short enough"
    )
    assert tell(store, 1, score=0.0, right="01234567890").unusable == TOO_LONG
    assert tell(store, 2, right="right").unusable == "the prompt holds more than text"
    assert store.counts() == Counts(2, 3, 0, {"the prompt holds more than text": 1, TOO_LONG: 1})
    assert store.examples(up_to=3, limit=9) == []
    assert [e.interaction_id for e in store.examples(up_to=1, limit=9)] == ["chatcmpl-1"]
    assert store.failures(after=1) == 0, "nothing new can be learnt, so no round starts for it"
    store.add_interactions([make_interaction(3)])
    assert (
        tell(store, 3, score=0.6).unusable
        == "it says neither that the answer was right nor what would have been right"
    )
    assert store.failures(after=1) == 1
    too_long_to_count = Feedback("chatcmpl-1", correction="x", correction_ids=None)
    assert store.add_feedback(too_long_to_count, max_tokens=MAX_TOKENS).unusable == TOO_LONG


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
    store.add_interactions(
        [make_interaction(number, answer="a" if number else "") for number in range(6)]
    )
    store.add_interactions([make_interaction(6, unusable="the prompt holds more than text")])
    drawn, reasons = random.Random(0), set[str]()
    given: list[str] = []
    for _ in range(60):
        score, correction = drawn.choice(
            [(None, "b"), (1.0, None), (0.0, None), (0.0, "c" * 20), (None, None)]
        )
        given.append(tell(store, drawn.randrange(7), score, correction, str(drawn.random())).id)
        if len(given) > 9:  # a correction stays until it is taken back
            store.withdraw(given.pop(drawn.randrange(9)))
        assert store.counts().examples == len(store.examples(up_to=store.cursor(), limit=100))
        assert store.counts() == ExperienceStore(tmp_path / "experience.db").counts()
        reasons |= set(store.counts().unusable)
    assert reasons == {"the prompt holds more than text", "the answer has no tokens", TOO_LONG}
