"""Which of several things that were said of one answer counts; the table of docs/learning.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edge_node.errors import UnknownEpisode
from edge_node.experience import EpisodeFeedback, ExperienceStore, Feedback, Interaction, Teller
from tests.unit.edge_node.experience.test_experience_store import make_interaction

MODEL = "lorikeet@v1-aaaaaaaa"
ALICE = Teller("alice")
UP, DOWN = Feedback("chatcmpl-1", 1.0, form="thumb"), Feedback("chatcmpl-1", 0.0, form="thumb")
HALF = Feedback("chatcmpl-1", 0.6)
FIRST = Feedback("chatcmpl-1", correction="a", correction_ids=(97,))
SECOND = Feedback("chatcmpl-1", correction="b", correction_ids=(98,))
CALL = Feedback("chatcmpl-1", correction="[]", correction_ids=(99,), form="tool_calls")
REMARK = Feedback("chatcmpl-1", comment="thanks")
EPISODE = EpisodeFeedback("e", 1.0)
LIMIT = 50


@pytest.fixture
def store(tmp_path: Path) -> ExperienceStore:
    store = ExperienceStore(tmp_path / "experience.db")
    store.add_interactions([in_episode(1)])
    return store


def in_episode(number: int, user: str = "alice") -> Interaction:
    return replace(make_interaction(number), episode="e", user=user)


def verdict(store: ExperienceStore) -> str:
    """What the answer teaches: the letter of its correction, or how it was judged."""
    examples = store.examples(up_to=99, limit=9)
    corrected = [chr(e.target_ids[0]) for e in examples if e.source == "correction"]
    return corrected[0] if corrected else store.verdict("chatcmpl-1")


@pytest.mark.parametrize("first_teller", [ALICE, Teller()], ids=["same-user", "another-user"])
@pytest.mark.parametrize(
    ("first", "second", "counts", "the_other_way_round"),
    [
        (FIRST, UP, "a", "a"),
        (FIRST, DOWN, "a", "a"),
        (FIRST, HALF, "a", "a"),
        (FIRST, REMARK, "a", "a"),
        (FIRST, EPISODE, "a", "a"),
        (FIRST, SECOND, "b", "a"),
        (FIRST, CALL, "c", "a"),
        (CALL, UP, "c", "c"),
        (UP, DOWN, "disliked", "liked"),
        (UP, HALF, "undecided", "liked"),
        (UP, REMARK, "liked", "liked"),
        (DOWN, EPISODE, "disliked", "disliked"),
        (HALF, EPISODE, "undecided", "undecided"),
        (REMARK, EPISODE, "liked", "liked"),
    ],
    ids=lambda said: said if isinstance(said, str) else getattr(said, "kind", "episode"),
)
def test_what_counts_of_two_things_that_were_said(
    store: ExperienceStore,
    tmp_path: Path,
    first: Feedback,
    second: Feedback,
    counts: str,
    the_other_way_round: str,
    first_teller: Teller,
) -> None:
    for said, teller in ((first, first_teller), (second, ALICE)):
        store.give(said, max_tokens=LIMIT, teller=teller)
    assert verdict(store) == counts
    again = ExperienceStore(tmp_path / "again.db")
    again.add_interactions([in_episode(1)])
    for said, teller in ((second, first_teller), (first, ALICE)):
        again.give(said, max_tokens=LIMIT, teller=teller)
    assert verdict(again) == the_other_way_round


def test_what_is_outranked_is_no_news_and_starts_no_round(store: ExperienceStore) -> None:
    store.give(FIRST, max_tokens=LIMIT)
    cursor = store.cursor()
    store.give(DOWN, max_tokens=LIMIT)
    store.give(UP, max_tokens=LIMIT)
    assert store.cursor() == cursor + 2
    for count in (store.failures, store.judged, store.corrections, store.dislikes):
        assert count(after=cursor, model=MODEL) == 0
        assert count(after=0, model=MODEL) == (count != store.dislikes)
    assert (store.counts().liked, store.counts().disliked, store.counts().examples) == (0, 0, 1)


def test_without_its_correction_an_earlier_thumb_counts_again(store: ExperienceStore) -> None:
    store.give(DOWN, max_tokens=LIMIT)
    correction = store.give(FIRST, max_tokens=LIMIT)
    assert store.counts().disliked == 0
    store.withdraw(correction.id)
    assert verdict(store) == "disliked"
    assert (store.counts().disliked, store.counts().examples) == (1, 0)


def test_an_episodes_feedback_reaches_the_answers_it_has_then(store: ExperienceStore) -> None:
    store.add_interactions([in_episode(2), make_interaction(3)])
    receipt = store.give(EPISODE, max_tokens=LIMIT)
    assert (receipt.answers, receipt.unusable) == (2, "")
    assert store.give(EPISODE, max_tokens=LIMIT) == receipt, "the same again right after"
    store.add_interactions([in_episode(4)])
    judged = [e.interaction_id for e in store.examples(up_to=99, limit=9)]
    assert sorted(judged) == ["chatcmpl-1", "chatcmpl-2"], "what comes later was not judged"
    assert store.give(EPISODE, max_tokens=LIMIT).answers == 3
    told = store.feedback(receipt.id)
    assert (told.episode, told.score, len(told.interactions)) == ("e", 1.0, 2)
    store.withdraw(store.give(EPISODE, max_tokens=LIMIT).id)
    store.withdraw(receipt.id)
    assert store.counts().liked == 0


def test_an_episode_of_another_user_is_unknown(store: ExperienceStore) -> None:
    with pytest.raises(UnknownEpisode, match="x-lorikeet-episode"):
        store.give(EpisodeFeedback("f", 1.0), max_tokens=LIMIT)
    with pytest.raises(UnknownEpisode):
        store.give(EPISODE, max_tokens=LIMIT, teller=Teller("bob"))
    store.add_interactions([in_episode(2, user="bob")])
    assert store.give(EPISODE, max_tokens=LIMIT, teller=Teller("bob")).answers == 1
    assert store.verdict("chatcmpl-1") == ""
    assert store.give(EPISODE, max_tokens=LIMIT).answers == 2


def test_an_episode_of_which_nothing_can_be_learnt_says_why(store: ExperienceStore) -> None:
    assert store.give(EPISODE, max_tokens=2).unusable.startswith("prompt and answer together")
    assert "neither" in store.give(EpisodeFeedback("e", 0.6), max_tokens=LIMIT).unusable
    assert store.counts().examples == 0
