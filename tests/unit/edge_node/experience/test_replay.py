"""Which earlier examples are drawn, and that what was deleted is not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_node.errors import UnknownInteraction
from edge_node.experience import ExperienceStore
from edge_node.experience.replay import draw
from tests.unit.edge_node.experience.test_experience_store import make_interaction, tell

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=6)


def examples(sizes: list[int]) -> list[tuple[str, str]]:
    """So many examples of each release."""
    return [
        (f"{release}-{n}", f"v{release}") for release, size in enumerate(sizes) for n in range(size)
    ]


@given(SIZES, st.integers(0, 100), st.integers(0, 5), st.randoms())
def test_each_release_has_an_equal_part_as_far_as_it_has_any(
    sizes: list[int], count: int, seed: int, order: object
) -> None:
    everything = examples(sizes)
    drawn = draw(everything, count=count, seed=seed)
    assert len(drawn) == len(set(drawn)) == min(count, len(everything))
    parts = Counter(name.partition("-")[0] for name in drawn)
    most = max(parts.values(), default=0)
    assert all(
        parts[str(release)] == size or parts[str(release)] >= most - 1
        for release, size in enumerate(sizes)
    )
    order.shuffle(everything)  # type: ignore[attr-defined]
    assert draw(everything, count=count, seed=seed) == drawn


def test_a_seed_draws_a_uniform_sample() -> None:
    seen = Counter(name for seed in range(600) for name in draw(examples([20]), count=5, seed=seed))
    assert len(seen) == 20
    assert all(100 < times < 200 for times in seen.values()), "150 each, standard deviation 11"


def store_with_releases(path: Path, count: int) -> ExperienceStore:
    store = ExperienceStore(path / "experience.db")
    for number in range(count):
        model = f"lorikeet@v{number // 10}-aaaaaaaa"
        store.add_interactions([make_interaction(number, model=model)])
        tell(store, number, right="right")
    return store


def test_the_store_replays_what_other_releases_answered_also_beyond_the_newest(
    tmp_path: Path,
) -> None:
    store = store_with_releases(tmp_path, 40)
    newest = store.examples(up_to=40, limit=10)
    assert {example.model for example in newest} == {"lorikeet@v3-aaaaaaaa"}
    drawn = store.replay(up_to=40, but="@v3-aaaaaaaa", count=9, seed=1)
    models = Counter(example.model for example in drawn)
    assert models == {f"lorikeet@v{version}-aaaaaaaa": 3 for version in (0, 1, 2)}
    known = {example.feedback_id: example for example in store.examples(up_to=40, limit=99)}
    assert all(known[example.feedback_id] == example for example in drawn)
    assert store.replay(up_to=40, but="@v3-aaaaaaaa", count=9, seed=1) == drawn
    assert store.replay(up_to=40, but="@v3-aaaaaaaa", count=9, seed=2) != drawn
    early = store.replay(up_to=10, but="@v3-aaaaaaaa", count=9, seed=1)
    assert {example.model for example in early} == {"lorikeet@v0-aaaaaaaa"}
    assert store.replay(up_to=40, but="@v3-aaaaaaaa", count=0, seed=1) == []


def test_a_seed_draws_the_same_in_every_store_of_the_same_experience(tmp_path: Path) -> None:
    stores = [store_with_releases(tmp_path / name, 40) for name in ("one", "other")]
    drawn = [store.replay(up_to=40, but="@v3-aaaaaaaa", count=9, seed=1) for store in stores]
    one, other = ([example.interaction_id for example in examples] for examples in drawn)
    assert one == other


def test_what_was_deleted_never_comes_back(tmp_path: Path) -> None:
    store = store_with_releases(tmp_path, 20)
    other = ExperienceStore(tmp_path / "experience.db")
    assert (other.counts().examples, other.deleted()) == (20, 0)
    store.delete("chatcmpl-3")
    with pytest.raises(UnknownInteraction):
        store.delete("chatcmpl-3")
    with pytest.raises(UnknownInteraction):
        tell(store, 3, right="right")
    # Capture that comes late, or again.
    model = "lorikeet@v0-aaaaaaaa"
    store.add_interactions([make_interaction(3, model=model), make_interaction(20, model=model)])
    assert store.interaction("chatcmpl-3") is None
    assert store.interaction("chatcmpl-20") is not None
    assert (other.counts().examples, other.counts().interactions, other.deleted()) == (19, 20, 1)
    names = {e.interaction_id for e in store.examples(up_to=99, limit=99)}
    for seed in range(20):
        names |= {e.interaction_id for e in store.replay(up_to=99, but="@", count=99, seed=seed)}
    assert names == {f"chatcmpl-{number}" for number in range(20)} - {"chatcmpl-3"}


def test_when_everything_was_deleted_nothing_is_counted(tmp_path: Path) -> None:
    store = store_with_releases(tmp_path, 2)
    assert store.counts().examples == 2
    for number in range(2):
        store.delete(f"chatcmpl-{number}")
    assert store.counts().examples == 0


def test_a_deletion_leaves_no_text_in_the_files(tmp_path: Path) -> None:
    store = ExperienceStore(tmp_path / "experience.db")
    store.add_interactions([make_interaction(1, answer="Zebrafish"), make_interaction(2)])
    tell(store, 1, right="Kingfisher")
    assert held(tmp_path) == [b"Kingfisher", b"Zebrafish"]
    store.delete("chatcmpl-1")
    assert held(tmp_path) == []
    assert store.interaction("chatcmpl-2") == make_interaction(2)


def held(folder: Path) -> list[bytes]:
    """What is in any of the files, their log too."""
    files = [path.read_bytes() for path in folder.iterdir()]
    return [text for text in (b"Kingfisher", b"Zebrafish") if any(text in data for data in files)]
