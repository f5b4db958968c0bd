from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from edge_node.errors import SettingsError, StorageError
from edge_node.experience import (
    Answer,
    Choice,
    EpisodeFeedback,
    ExperienceStore,
    Feedback,
    Interaction,
    Preference,
    Scores,
    Teller,
    open_experience,
)
from edge_node.experience.sealing import CLEAR, MAGIC, Sealing, key_id, read_key_file
from edge_node.experience.selection import Selection
from edge_node.experience_settings import ExperienceSettings
from edge_node.settings import EdgeSettings

KEY, OTHER = b"k" * 32, b"o" * 32
SECRETS = (
    "the question",
    "the answer",
    "the correction",
    "the comment",
    "while it waits",
    "of all",
)
IDS = (70001, 70002, 70003)
"""Their bytes stand nowhere else."""
ALL = Selection()
EVERYTHING = " + ".join(
    ["SELECT (SELECT COUNT(*) FROM interactions)"]
    + [f"(SELECT COUNT(*) FROM {table})" for table in ("choices", "feedback", "waiting", "sent")]
)


def make_store(path: Path, *keys: bytes) -> ExperienceStore:
    return ExperienceStore(path / "experience.db", sealing=Sealing(keys))


def make_interaction(number: int) -> Interaction:
    return Interaction(
        f"chatcmpl-{number}", "2026-11-22T12:00:00+00:00", "lorikeet@v1",
        [{"role": "user", "content": "the question"}], f"the answer {number}", "stop",
        "/v1/chat/completions", IDS, (*IDS, number), user="anna", episode="e", environment="shop",
        choices=(Choice((*IDS, number), (-0.5,) * 4), Choice((*IDS, 9), (-0.25,) * 4)),
    )  # fmt: skip


def fill(store: ExperienceStore) -> None:
    """Everything that the store takes, in each way in."""
    store.add_interactions([make_interaction(number) for number in range(1, 5)])
    said = Feedback("chatcmpl-1", 0.5, "the correction", "the comment", IDS)
    once = Teller(once="once", digest="a digest of the body")
    store.add_feedback(said, max_tokens=99, teller=once)
    store.add_feedback(Feedback("chatcmpl-2", 1.0), max_tokens=99)
    store.add_feedback(Feedback("chatcmpl-3", 0.0), max_tokens=99)
    pair = Preference(Answer("chatcmpl-2"), Answer("chatcmpl-3"))
    store.add_preference(pair, max_tokens=99)
    store.add_scores(Scores("chatcmpl-2", (0.1, 0.9)), max_tokens=99)
    store.add_episode_feedback(EpisodeFeedback("e", 1.0, "of all"), max_tokens=99)
    late = Teller(expects=frozenset({"chatcmpl-9"}))
    store.give(Feedback("chatcmpl-9", 1.0, comment="while it waits"), max_tokens=99, teller=late)


def read(store: ExperienceStore) -> list[object]:
    """Everything that it gives, in each way out."""
    known = {"up_to": store.cursor(), "limit": 99}
    first = store.said_of("chatcmpl-1")
    return [
        store.interaction("chatcmpl-1"),
        [dataclasses.replace(one, feedback_id="") for one in store.examples(**known)],
        store.thumbs(**known),
        store.pairs(**known),
        store.groups(model="lorikeet@v1", **known),
        [(told.correction, told.comment) for told in first],
        [(one.prompt_tokens, one.answer_tokens) for one in store.lines(ALL, limit=9)],
        store.counts(),
        store.waiting(),
    ]


def leaks(folder: Path) -> list[str]:
    """What of the secrets can be read in the file, its log and its free pages."""
    raw = b"".join(file.read_bytes() for file in sorted(folder.glob("experience.db*")))
    texts = [secret for secret in (*SECRETS, "a digest of") if secret.encode() in raw]
    packed = b"".join(number.to_bytes(4, "little") for number in IDS)
    return texts + ["ids"] * (packed in raw)


def test_a_sealed_store_gives_what_a_clear_one_gives_and_its_file_shows_nothing(
    tmp_path: Path,
) -> None:
    clear, sealed = make_store(tmp_path / "clear"), make_store(tmp_path / "sealed", KEY)
    fill(clear)
    fill(sealed)
    assert read(sealed) == read(clear)
    assert len(leaks(tmp_path / "clear")) == len(SECRETS) + 2, "the test sees what is in clear"
    assert not leaks(tmp_path / "sealed")


def test_the_same_feedback_again_is_known_in_a_sealed_store_too(tmp_path: Path) -> None:
    store = make_store(tmp_path, KEY)
    fill(store)
    said = Feedback("chatcmpl-4", None, "x", "y", (1,))
    first = store.add_feedback(said, max_tokens=99)
    assert store.add_feedback(said, max_tokens=99) == first
    store.add_interactions([dataclasses.replace(make_interaction(8), prompt_ids=(1,))])
    pair = Preference(Answer("chatcmpl-1"), Answer("chatcmpl-8"))
    with pytest.raises(ValueError, match="different prompts"):
        store.add_preference(pair, max_tokens=99)
    again = Teller(once="once", digest="a digest of the body")
    known = store.add_feedback(said, max_tokens=99, teller=again)
    assert known != first, "an idempotency key is known too"


@pytest.mark.parametrize("keys", [(), (OTHER,)])
def test_without_its_key_a_store_is_not_opened_and_not_changed(
    tmp_path: Path, keys: tuple[bytes, ...]
) -> None:
    store = make_store(tmp_path, KEY)
    fill(store)
    store.close()
    file = tmp_path / "experience.db"
    before = file.read_bytes()
    expected = f"^Experience store {file} is sealed with key {key_id(KEY)}; EDGE_EXPERIENCE__KEY"
    with pytest.raises(StorageError, match=expected):
        make_store(tmp_path, *keys)
    assert file.read_bytes() == before
    assert make_store(tmp_path, KEY).counts().interactions == 4


def test_a_process_that_still_runs_without_the_key_says_so(tmp_path: Path) -> None:
    old, new = make_store(tmp_path), make_store(tmp_path, KEY)
    fill(new)
    with pytest.raises(StorageError, match=f"sealed with key {key_id(KEY)}, which EDGE_EXP"):
        old.examples(up_to=99, limit=9)


def test_turned_on_later_new_rows_are_sealed_and_the_others_read_as_they_are(
    tmp_path: Path,
) -> None:
    fill(make_store(tmp_path))
    store = make_store(tmp_path, KEY)
    store.add_interactions([make_interaction(7)])
    assert store.interaction("chatcmpl-7") == make_interaction(7)
    assert store.interaction("chatcmpl-1") == make_interaction(1)
    assert leaks(tmp_path)


def test_what_is_there_is_sealed_and_leaves_the_file(tmp_path: Path) -> None:
    fill(make_store(tmp_path))
    store = make_store(tmp_path, KEY)
    before = read(store)
    assert store.reseal() == store._count(EVERYTHING)
    assert store.reseal() == 0
    assert read(store) == before
    assert not leaks(tmp_path)


def test_keys_change_hands(tmp_path: Path) -> None:
    fill(make_store(tmp_path, KEY))
    both = make_store(tmp_path, OTHER, KEY)
    before = read(both)
    both.reseal()
    both.close()
    alone = make_store(tmp_path, OTHER)
    assert read(alone) == before
    with pytest.raises(StorageError, match=f"sealed with key {key_id(OTHER)}"):
        make_store(tmp_path, KEY)


def test_there_is_no_sealing_without_a_key(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="EDGE_EXPERIENCE__KEY_FILE is not set"):
        make_store(tmp_path).reseal()


@pytest.mark.parametrize("value", ["text ü", b"\x00\x01", "", b"", None])
def test_values_come_back_as_they_were(value: str | bytes | None) -> None:
    sealing = Sealing([KEY])
    sealed = sealing.seal(value)
    assert sealing.unseal(sealed) == value
    assert CLEAR.seal(value) == value
    assert CLEAR.unseal(value) == value
    if value is not None:
        assert isinstance(sealed, bytes)
        assert sealed.startswith(MAGIC)
        assert sealed != sealing.seal(value), "equal values look different"


def test_a_changed_value_is_an_error() -> None:
    sealed = Sealing([KEY]).seal("text")
    assert isinstance(sealed, bytes)
    for place in (len(MAGIC) + 5, len(sealed) - 1):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(StorageError, match="was changed"):
            Sealing([KEY]).unseal(bytes(changed))
    with pytest.raises(StorageError, match="was changed"):
        Sealing([KEY]).unseal(sealed[:20])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no key"),
        (b"abc", "key 1 has 3 characters that are not 64 hex digits"),
        (b"ab" * 32 + b"\n" + b"zz" * 32, "key 2 has 64 characters"),
        (b"\xff\xfe", "it is no text"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_named_and_not_quoted(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=expected) as caught:
        read_key_file(file)
    assert "zz" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_settings_name_the_key_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    experience = ExperienceSettings(key_file=file)
    settings = EdgeSettings(data_dir=tmp_path, experience=experience)
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        open_experience(settings)
    assert not (tmp_path / "experience.db").exists()
    file.write_text(f"{os.urandom(32).hex()}\n{KEY.hex()}\n")
    assert open_experience(settings).key == read_key_file(file).current != key_id(KEY)
