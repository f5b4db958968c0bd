"""A purge takes what it names, leaves tombstones, frees the disk, and a node goes on meanwhile."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from edge_node.experience import (
    ExperienceStore,
    Feedback,
    Interaction,
    Preference,
    Teller,
)
from edge_node.experience.comparisons import Answer
from edge_node.experience.removal import BATCH
from edge_node.experience.selection import Selection
from tests.unit.edge_node.experience.test_experience_store import make_interaction

MANY = BATCH * 2 + 50


def make(number: int, at: str = "2026-11-20", **labels: str) -> Interaction:
    made = make_interaction(number, answer="word " * 40)
    return replace(made, created_at=f"{at}T00:00:00+00:00", prompt_ids=(7,), **labels)


@pytest.fixture
def store(tmp_path: Path) -> ExperienceStore:
    store = ExperienceStore(tmp_path / "experience.db")
    store.add_interactions(
        [
            make(1, "2026-11-01", environment="desk", user="alice"),
            make(2, "2026-11-02", environment="lab", user="bob"),
            make(3, "2026-11-03", user="alice"),
        ]
    )
    for number in (1, 2, 3):
        store.add_feedback(Feedback(f"chatcmpl-{number}", 1.0), max_tokens=999)
    return store


def left(store: ExperienceStore) -> list[str]:
    return list(store.ids(Selection()))


@pytest.mark.parametrize(
    ("selection", "goes"),
    [
        (Selection(before="2026-11-02T12:00:00+00:00"), {1, 2}),
        (Selection(environment="desk"), {1}),
        (Selection(environment=""), {3}),
        (Selection(user="alice"), {1, 3}),
        (Selection(user="alice", environment="desk"), {1}),
        (Selection(), {1, 2, 3}),
        (Selection(environment="none"), set()),
    ],
)
def test_a_purge_takes_what_it_names_and_nothing_else(
    store: ExperienceStore, selection: Selection, goes: set[int]
) -> None:
    purged = store.purge(selection)
    assert (purged.interactions, purged.feedback) == (len(goes), len(goes))
    assert left(store) == [f"chatcmpl-{n}" for n in (1, 2, 3) if n not in goes]
    assert (store.deleted(), store.counts().liked) == (len(goes), 3 - len(goes))
    store.add_interactions([make(1), make(2), make(3)])
    assert len(left(store)) == 3 - len(goes), "what was purged never comes back"


def test_a_users_purge_takes_what_they_said_elsewhere(store: ExperienceStore) -> None:
    kept = store.add_feedback(Feedback("chatcmpl-2", 0.0), max_tokens=999)
    said = store.add_feedback(Feedback("chatcmpl-2", 0.4), max_tokens=999, teller=Teller("bob"))
    store.add_interactions([make(4, user="bob"), make(5)])
    pair = Preference(Answer("chatcmpl-5"), Answer("chatcmpl-4"))
    store.add_preference(pair, max_tokens=999)
    store.purge(Selection(user="bob"))
    assert store.counts().preferences == 0, "a pair goes with either of its answers"
    assert left(store) == ["chatcmpl-1", "chatcmpl-3", "chatcmpl-5"]
    for feedback_id in (kept.id, said.id):
        with pytest.raises(LookupError):
            store.feedback(feedback_id)


def test_a_purge_frees_the_disk_and_leaves_no_word(tmp_path: Path) -> None:
    path = tmp_path / "experience.db"
    store = ExperienceStore(path)
    store.add_interactions([make(number) for number in range(MANY)])
    store._truncate_log()
    before, heard = path.stat().st_size, list[int]()
    purged = store.purge(Selection(), heard.append)
    assert heard == [BATCH, 2 * BATCH, MANY]
    assert path.stat().st_size < before / 3, "tombstones stay"
    assert purged.freed_bytes == before - path.stat().st_size
    store.close()
    assert not any(b"word word" in file.read_bytes() for file in tmp_path.iterdir())


def test_a_node_writes_and_reads_while_another_process_purges(tmp_path: Path) -> None:
    node = ExperienceStore(tmp_path / "experience.db", busy_timeout_s=5)
    node.add_interactions([make(number) for number in range(MANY)])
    operator = ExperienceStore(tmp_path / "experience.db")
    done = threading.Event()

    def serve() -> None:
        number = MANY
        while not done.is_set():
            node.add_interactions([make(number, "2027-01-01")])
            node.add_feedback(Feedback(f"chatcmpl-{number}", 1.0), max_tokens=999)
            node.counts()
            number += 1
        served.append(number - MANY)

    served: list[int] = []
    thread = threading.Thread(target=serve)
    thread.start()
    operator.purge(Selection(before="2026-12-01T00:00:00+00:00"))
    done.set()
    thread.join()
    assert served[0] > 0
    assert len(left(node)) == served[0]
    assert node.counts().liked == served[0]


def test_an_export_ends_though_answers_come_faster_than_it_reads(
    store: ExperienceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_node.experience.browsing.PAGE", 2)
    seen = []
    for number, one in enumerate(store.ids(Selection())):
        store.add_interactions([make(100 + number, "2027-01-01")])
        seen.append(one)
    assert seen == ["chatcmpl-1", "chatcmpl-2", "chatcmpl-3"]
    store.delete("chatcmpl-2")
    assert len(left(store)) == 5


def test_what_waits_goes_with_its_answer_its_user_or_everything(store: ExperienceStore) -> None:
    for number in (7, 8):
        expecting = Teller("alice", expects=frozenset({f"chatcmpl-{number}"}))
        said = Feedback(f"chatcmpl-{number}", 1.0)
        store.give(said, max_tokens=9, teller=expecting)
    store.purge(Selection(user="bob"))
    assert store.waiting() == 2
    store.purge(Selection(before="2020-01-01T00:00:00+00:00"))
    assert store.waiting() == 2
    store.purge(Selection(user="alice"))
    assert store.waiting() == 0
