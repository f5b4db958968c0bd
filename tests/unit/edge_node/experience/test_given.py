"""Feedback by its id: idempotency keys, reading back, taking back, waiting for an answer."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from edge_node.errors import FeedbackWithdrawn, KeyReused, UnknownFeedback, UnknownInteraction
from edge_node.experience import (
    Answer,
    Choice,
    ExperienceStore,
    Feedback,
    Preference,
    Scores,
    Teller,
)
from edge_node.experience.sealing import CLEAR, Sealing
from edge_node.experience.selection import Selection
from tests.unit.edge_node.experience.test_experience_store import make_interaction

GOOD = Feedback("chatcmpl-1", 1.0, form="thumb")
RIGHT = Feedback("chatcmpl-1", 0.0, "right", "a remark", (5, 6))
ALICE, BOB = Teller("alice", "alice-key"), Teller("bob", "bob-key")


@pytest.fixture
def store(tmp_path: Path) -> ExperienceStore:
    store = ExperienceStore(tmp_path / "experience.db")
    store.add_interactions(
        [
            replace(make_interaction(1), user="alice"),
            replace(make_interaction(2), user="bob"),
        ]
    )
    return store


def give(store: ExperienceStore, said: object, teller: Teller = ALICE) -> str:
    return store.give(said, max_tokens=50, teller=teller).id  # type: ignore[arg-type]


def test_the_same_key_writes_once_whatever_came_between(store: ExperienceStore) -> None:
    with_key = replace(ALICE, once="k", digest="1")
    first = give(store, GOOD, with_key)
    other = give(store, RIGHT)
    assert (give(store, GOOD, with_key), store.cursor()) == (first, 2)
    assert give(store, GOOD) not in (first, other), "without a key it is news"
    with pytest.raises(KeyReused, match="another body"):
        give(store, RIGHT, replace(with_key, digest="2"))
    assert store.cursor() == 3
    assert give(store, GOOD, replace(Teller(), once="k", digest="1")) != first, "another sender's"


def test_a_key_is_not_taken_by_what_was_refused(store: ExperienceStore) -> None:
    with_key = replace(ALICE, once="k", digest="1")
    with pytest.raises(UnknownInteraction):
        give(store, replace(GOOD, interaction_id="chatcmpl-9"), with_key)
    assert give(store, RIGHT, replace(with_key, digest="2"))


def test_a_key_is_forgotten_after_a_week_and_with_its_feedback(
    store: ExperienceStore, tmp_path: Path
) -> None:
    with_key = replace(ALICE, once="k", digest="1")
    first = give(store, GOOD, with_key)
    with sqlite3.connect(tmp_path / "experience.db") as db:
        db.execute("UPDATE sent SET at = '2020-01-01'")
    give(store, RIGHT, replace(ALICE, once="other", digest="1"))
    assert give(store, GOOD, with_key) != first
    store.delete("chatcmpl-1")
    with sqlite3.connect(tmp_path / "experience.db") as db:
        assert db.execute("SELECT COUNT(*) FROM sent").fetchone() == (0,)


@pytest.mark.parametrize("goes", ["user", "age", "retention", "answer"])
def test_a_key_is_forgotten_with_feedback_that_waits(store: ExperienceStore, goes: str) -> None:
    waits = Preference(Answer("chatcmpl-1"), Answer("chatcmpl-3"))
    expects = frozenset({"chatcmpl-3"})
    with_key = replace(ALICE, once="k", digest="1", expects=expects)
    first = store.give(waits, max_tokens=50, teller=with_key)
    assert first.waits
    if goes == "retention":
        store.remove_older(0, lambda: 0)
    elif goes == "answer":
        store.delete("chatcmpl-1")
    else:
        store.purge(Selection(user="alice") if goes == "user" else Selection(before="9999"))
    assert store.waiting() == 0
    later = replace(RIGHT, interaction_id="chatcmpl-3")
    assert store.give(later, max_tokens=50, teller=replace(with_key, digest="2")).id != first.id


def test_feedback_is_read_back_as_it_was_said(store: ExperienceStore) -> None:
    told = store.feedback(give(store, RIGHT), "alice")
    assert (told.kind, told.score, told.correction, told.comment) == (
        "correction", 0.0, "right", "a remark",
    )  # fmt: skip
    assert (told.interactions, told.user, told.unusable) == (("chatcmpl-1",), "alice", "")
    assert store.feedback(give(store, GOOD)).kind == "thumb"
    said = Preference(Answer("chatcmpl-1"), Answer("chatcmpl-1", 1))
    with pytest.raises(ValueError, match="choice 1"):
        give(store, said)


def test_only_ones_own_is_read_or_taken_back(store: ExperienceStore) -> None:
    feedback_id = give(store, RIGHT)
    for user in ("bob", ""):
        with pytest.raises(UnknownFeedback):
            store.feedback(feedback_id, user)
        with pytest.raises(UnknownFeedback):
            store.withdraw(feedback_id, user)
    assert store.feedback(feedback_id).user == "alice", "a key without a user reads all"
    with pytest.raises(UnknownFeedback):
        store.feedback("fb-none")
    of_the_node = store.give(replace(GOOD, score=0.0), max_tokens=50).id
    with pytest.raises(UnknownFeedback):
        store.feedback(of_the_node, "alice")  # of her answer, but not hers


def test_a_user_judges_only_answers_to_them(store: ExperienceStore) -> None:
    with pytest.raises(UnknownInteraction):
        give(store, GOOD, BOB)
    with pytest.raises(UnknownInteraction):
        give(store, Preference(Answer("chatcmpl-1"), Answer("chatcmpl-2")), ALICE)
    assert store.cursor() == 0


def test_what_was_taken_back_leaves_a_tombstone_and_no_word(
    store: ExperienceStore, tmp_path: Path
) -> None:
    feedback_id = give(store, replace(RIGHT, correction="a rare word"))
    at = store.withdraw(feedback_id, "alice")
    assert store.withdraw(feedback_id, "alice") == at, "again is the same"
    with pytest.raises(FeedbackWithdrawn, match=at[:10]):
        store.feedback(feedback_id, "alice")
    with pytest.raises(UnknownFeedback) as told:
        store.feedback(feedback_id, "bob")
    assert not isinstance(told.value, FeedbackWithdrawn)
    assert store.examples(up_to=99, limit=9) == []
    assert store.interaction("chatcmpl-1") is not None
    store.close()
    assert not any(b"a rare word" in file.read_bytes() for file in tmp_path.iterdir())


def test_a_deletion_counts_for_a_plan_that_knew_the_feedback(store: ExperienceStore) -> None:
    first, cursor = give(store, RIGHT), store.cursor()
    later = give(store, GOOD)
    store.withdraw(later)
    assert (store.deleted(up_to=cursor), store.deleted()) == (0, 1)
    store.withdraw(first)
    assert (store.deleted(up_to=cursor), store.deleted()) == (1, 2)
    store.delete("chatcmpl-2")
    assert store.deleted(up_to=cursor) == 2


def test_feedback_waits_for_an_answer_under_way(store: ExperienceStore, tmp_path: Path) -> None:
    expecting = replace(ALICE, expects=frozenset({"chatcmpl-3"}))
    said = replace(RIGHT, interaction_id="chatcmpl-3")
    receipt = store.give(said, max_tokens=50, teller=expecting)
    assert (receipt.waits, store.cursor(), store.waiting()) == (True, 0, 1)
    told = store.feedback(receipt.id, "alice")
    assert (told.waits, told.correction, told.interactions) == (True, "right", ("chatcmpl-3",))
    store.close()
    store = ExperienceStore(tmp_path / "experience.db")  # the process was killed meanwhile
    store.add_interactions([replace(make_interaction(3), user="alice")])
    (example,) = store.examples(up_to=99, limit=9)
    assert (example.feedback_id, example.target_ids) == (receipt.id, (5, 6))
    assert (store.feedback(receipt.id).waits, store.waiting()) == (False, 0)
    assert store.feedback(receipt.id).created_at == told.created_at


@pytest.mark.parametrize("sealing", [CLEAR, Sealing([b"k" * 32])])
def test_the_same_feedback_waits_once(tmp_path: Path, sealing: Sealing) -> None:
    store = ExperienceStore(tmp_path / "sealed.db", sealing=sealing)
    expecting = replace(ALICE, expects=frozenset({"chatcmpl-3"}))
    said = replace(RIGHT, interaction_id="chatcmpl-3")
    first, again = (store.give(said, max_tokens=50, teller=expecting) for _ in range(2))
    assert (again, store.waiting()) == (first, 1)
    other = store.give(replace(said, score=0.5), max_tokens=50, teller=expecting)
    third = store.give(said, max_tokens=50, teller=expecting)
    assert len({first.id, other.id, third.id}) == store.waiting() == 3, "it was said anew"
    store.add_interactions([replace(make_interaction(3), user="alice")])
    assert (store.waiting(), store.cursor()) == (0, 3)


def test_a_preference_waits_for_both_answers(store: ExperienceStore) -> None:
    said = Preference(Answer("chatcmpl-3"), Answer("chatcmpl-4"))
    expecting = Teller(expects=frozenset({"chatcmpl-3", "chatcmpl-4"}))
    receipt = store.give(said, max_tokens=50, teller=expecting)
    prompt = {"prompt_ids": (9,)}
    store.add_interactions([replace(make_interaction(4), **prompt)])
    assert store.feedback(receipt.id).waits
    store.add_interactions([replace(make_interaction(3, answer="x"), **prompt)])
    assert not store.feedback(receipt.id).waits
    assert len(store.pairs(up_to=99, limit=9)) == 1


def test_what_does_not_fit_its_answer_says_so_and_can_be_deleted(store: ExperienceStore) -> None:
    expecting = Teller(expects=frozenset({"chatcmpl-3"}))
    receipt = store.give(Scores("chatcmpl-3", (0.0, 1.0)), max_tokens=50, teller=expecting)
    two = (Choice((3,), (-1.0,)),) * 3
    store.add_interactions([replace(make_interaction(3), choices=two)])
    assert "scores has 2 items; expected 3" in store.feedback(receipt.id).refused
    store.withdraw(receipt.id)
    assert store.waiting() == 0
    assert store.deleted() == 0, "no plan knew it"


def test_nothing_waits_for_an_answer_that_is_not_under_way(store: ExperienceStore) -> None:
    said = Preference(Answer("chatcmpl-3"), Answer("chatcmpl-9"))
    with pytest.raises(UnknownInteraction, match="chatcmpl-9"):
        store.give(said, max_tokens=50, teller=Teller(expects=frozenset({"chatcmpl-3"})))
    with pytest.raises(UnknownInteraction):
        give(store, replace(GOOD, interaction_id="chatcmpl-3"))
    assert store.waiting() == 0
