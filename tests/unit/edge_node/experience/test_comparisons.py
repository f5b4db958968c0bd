from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest

from edge_node.errors import UnknownInteraction
from edge_node.experience import (
    Answer,
    Choice,
    ExperienceStore,
    Feedback,
    Group,
    Interaction,
    Pair,
    Preference,
    Scores,
    Thumb,
)
from edge_node.experience.schema import SCHEMA
from edge_node.experience.usable import SAME_ANSWERS, SAME_SCORES

V1, V2 = "lorikeet@v1-aaaaaaaa", "lorikeet@v2-bbbbbbbb"
MANY = {"up_to": 99, "limit": 9}


def make_interaction(
    number: int,
    *,
    prompt: int = 7,
    model: str = V1,
    choices: tuple[Choice, ...] = (),
    unusable: str = "",
) -> Interaction:
    return Interaction(
        f"c-{number}", "2026-11-22T12:00:00+00:00", model, [], "", "stop", "/v1/chat/completions",
        (prompt,), choices[0].answer_ids if choices else (number, 2), unusable, choices,
    )  # fmt: skip


THREE = tuple(Choice((10 + index, 2), (-0.5, -0.25)) for index in range(3))


@pytest.fixture
def store(tmp_path: Path) -> ExperienceStore:
    return ExperienceStore(tmp_path / "experience.db")


def prefer(store: ExperienceStore, chosen: Answer, rejected: Answer, longest: int = 9) -> str:
    return store.add_preference(Preference(chosen, rejected), max_tokens=longest).unusable


def score(store: ExperienceStore, number: int, *scores: float) -> str:
    return store.add_scores(Scores(f"c-{number}", scores), max_tokens=9).unusable


def test_a_preference_is_a_pair_of_ids_as_served(store: ExperienceStore) -> None:
    store.add_interactions([make_interaction(1), make_interaction(2, choices=THREE)])
    assert store.interaction("c-2") == make_interaction(2, choices=THREE)
    assert prefer(store, Answer("c-1"), Answer("c-2", 2)) == ""
    assert prefer(store, Answer("c-2", 1), Answer("c-2", 0)) == ""
    assert store.pairs(**MANY) == [Pair((7,), (11, 2), (10, 2)), Pair((7,), (1, 2), (12, 2))]
    assert store.pairs(up_to=1, limit=9) == [Pair((7,), (1, 2), (12, 2))]
    assert store.examples(**MANY) == [], "none of the two is known to be right"
    assert (store.counts().preferences, store.counts().feedback) == (2, 2)


def test_the_newest_word_on_two_answers_counts_and_a_repeat_is_none(store: ExperienceStore) -> None:
    store.add_interactions([make_interaction(1), make_interaction(2)])
    first = store.add_preference(Preference(Answer("c-1"), Answer("c-2")), max_tokens=9)
    again = store.add_preference(Preference(Answer("c-1"), Answer("c-2")), max_tokens=9)
    assert (first, store.cursor()) == (again, 1)
    prefer(store, Answer("c-2"), Answer("c-1"))
    assert store.pairs(**MANY) == [Pair((7,), (2, 2), (1, 2))]
    assert store.counts().preferences == 1


@pytest.mark.parametrize(
    ("chosen", "rejected", "error", "message"),
    [
        (Answer("c-1"), Answer("c-9"), UnknownInteraction, "c-9"),
        (Answer("c-1"), Answer("c-3"), ValueError, "answer different prompts"),
        (Answer("c-1"), Answer("c-1"), ValueError, "the same answer"),
        (Answer("c-2"), Answer("c-2", 3), ValueError, "choice 3 of answer c-2"),
        (Answer("c-1", 1), Answer("c-2"), ValueError, "choice 1 of answer c-1"),
    ],
)
def test_a_preference_that_means_nothing_changes_nothing(
    store: ExperienceStore, chosen: Answer, rejected: Answer, error: type[Exception], message: str
) -> None:
    store.add_interactions(
        [make_interaction(1), make_interaction(2, choices=THREE), make_interaction(3, prompt=8)]
    )
    with pytest.raises(error, match=message):
        prefer(store, chosen, rejected)
    assert store.cursor() == 0


def test_a_preference_that_cannot_be_learnt_says_why(store: ExperienceStore) -> None:
    same = Interaction(**{**vars(make_interaction(1)), "id": "c-9"})
    images = make_interaction(2, unusable="the prompt holds more than text")
    store.add_interactions([make_interaction(1), same, images])
    assert prefer(store, Answer("c-1"), Answer("c-9")) == "both answers are the same"
    assert prefer(store, Answer("c-1"), Answer("c-2")) == "the prompt holds more than text"
    assert "more than 2 tokens" in prefer(store, Answer("c-9"), Answer("c-2"), 2)
    assert store.pairs(**MANY) == []
    assert store.counts().preferences == 0
    assert store.counts().unusable_comparisons == {
        "both answers are the same": 1,
        "the prompt holds more than text": 1,
        "prompt and answer together have more than 2 tokens": 1,
    }
    assert store.counts().unusable == {}


def test_scores_make_a_group_of_one_version(store: ExperienceStore) -> None:
    store.add_interactions(
        [make_interaction(1, choices=THREE), make_interaction(2, choices=THREE, model=V2)]
    )
    assert score(store, 1, 0.0, 1.0, -3.5) == ""
    assert score(store, 1, 0.5, 1.0, -3.5) == ""
    assert score(store, 2, 1.0, 0.0, 0.0) == ""
    logprobs = ((-0.5, -0.25),) * 3
    expected = Group("c-1", (7,), ((10, 2), (11, 2), (12, 2)), logprobs, (0.5, 1.0, -3.5))
    assert store.groups(model=V1, **MANY) == [expected]
    assert store.counts().scored_groups == 2
    assert store.new_comparisons("group", after=0) == 3
    assert store.new_comparisons("group", after=1, model=V1) == 1


@pytest.mark.parametrize(
    ("number", "scores", "message"),
    [
        (1, (1.0, 0.0), "scores has 2 items; expected 3"),
        (1, (1.0, 0.0, float("inf")), "not finite"),
        (2, (1.0, 0.0), "has one choice"),
    ],
)
def test_scores_that_fit_no_group_change_nothing(
    store: ExperienceStore, number: int, scores: tuple[float, ...], message: str
) -> None:
    store.add_interactions([make_interaction(1, choices=THREE), make_interaction(2)])
    with pytest.raises(ValueError, match=message):
        score(store, number, *scores)
    with pytest.raises(UnknownInteraction):
        score(store, 9, 1.0, 0.0)
    assert store.cursor() == 0


def test_a_group_that_cannot_be_learnt_says_why(store: ExperienceStore) -> None:
    unknown = (THREE[0], Choice((4, 2)))
    store.add_interactions(
        [make_interaction(1, choices=THREE), make_interaction(2, choices=unknown)]
    )
    assert score(store, 1, 1.0, 1.0, 1.0) == "all answers have the same score"
    assert score(store, 1, 1.0, 1.0 + 1e-7, 1.0) == "all answers have the same score"
    assert score(store, 2, 1.0, 0.0) == "the log-probabilities of the answers are not known"
    assert store.groups(model=V1, **MANY) == []


def test_thumbs_are_answers_that_were_judged_and_not_corrected(store: ExperienceStore) -> None:
    store.add_interactions([make_interaction(number) for number in range(1, 6)])
    for number, said in enumerate((1.0, 0.0, 0.7, 0.49), 1):
        receipt = store.add_feedback(Feedback(f"c-{number}", said), max_tokens=9)
        assert bool(receipt.unusable) is (said == 0.7)
    store.add_feedback(Feedback("c-5", 0.0, "right", None, (5,)), max_tokens=9)
    good, bad = Thumb((7,), (1, 2), True), [Thumb((7,), (n, 2), False) for n in (4, 2)]
    assert store.thumbs(**MANY) == [good, *bad]
    assert (store.counts().liked, store.counts().disliked) == (1, 2)
    assert (store.dislikes(after=2, model=V1), store.dislikes(after=2, model=V2)) == (1, 0)
    assert store.corrections(after=0, model=V1) == 1
    store.add_feedback(Feedback("c-2", 1.0), max_tokens=9)
    assert (store.counts().liked, store.counts().disliked) == (2, 1)


@pytest.mark.parametrize("deleted", [1, 2])
def test_what_refers_to_a_deleted_answer_goes_with_it(store: ExperienceStore, deleted: int) -> None:
    of_three = [make_interaction(number, choices=THREE) for number in (1, 2, 3)]
    store.add_interactions(of_three)
    prefer(store, Answer("c-1"), Answer("c-2", 1))
    prefer(store, Answer("c-3"), Answer("c-3", 1))
    for number in (1, 2):
        score(store, number, 0.0, 1.0, 2.0)
    assert (store.counts().preferences, store.counts().scored_groups) == (2, 2)
    store.delete(f"c-{deleted}")
    store.add_interactions(of_three)  # it never comes back
    assert (store.counts().preferences, store.counts().scored_groups) == (1, 1)
    assert [pair.chosen_ids for pair in store.pairs(**MANY)] == [(10, 2)]
    (group,) = store.groups(model=V1, **MANY)
    assert group.interaction_id == f"c-{3 - deleted}"
    with pytest.raises(UnknownInteraction):
        store.delete(f"c-{deleted}")


def test_a_file_of_earlier_software_is_read_and_gets_the_new_tables(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "experience.db") as db:
        db.executescript(SCHEMA + "PRAGMA user_version=2;")
        db.execute(
            "INSERT INTO interactions VALUES ('c-1', '', ?, '', 'stop', '[]', '', X'07000000', "
            "X'0100000002000000', '')",
            (V1,),
        )
    store = ExperienceStore(tmp_path / "experience.db")
    store.add_interactions([make_interaction(2)])
    assert prefer(store, Answer("c-1"), Answer("c-2")) == ""
    assert store.pairs(**MANY) == [Pair((7,), (1, 2), (2, 2))]
    store.delete("c-1")
    assert store.pairs(**MANY) == []


def test_counting_what_is_new_equals_counting_everything(tmp_path: Path) -> None:
    store = ExperienceStore(tmp_path / "experience.db")
    store.add_interactions([make_interaction(number, choices=THREE) for number in range(3)])
    drawn = random.Random(0)
    for _ in range(40):
        if drawn.random() < 0.5:
            score(store, drawn.randrange(3), drawn.choice((0.0, 1.0)), 1.0, 1.0)
        else:
            chosen, rejected = drawn.sample(
                [Answer(f"c-{n}", c) for n in range(3) for c in (0, 1)], 2
            )
            prefer(store, chosen, rejected)
        counts, everything = store.counts(), {"up_to": store.cursor(), "limit": 99}
        assert counts == ExperienceStore(tmp_path / "experience.db").counts()
        assert counts.preferences == len(store.pairs(**everything))
        assert counts.scored_groups == len(store.groups(model=V1, **everything))
        assert counts.scored_groups == store.count_groups(up_to=store.cursor(), model=V1)
    assert set(counts.unusable_comparisons) == {SAME_ANSWERS, SAME_SCORES}
