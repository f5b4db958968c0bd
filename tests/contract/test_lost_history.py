"""A journal that was lost, rolled back or rewritten is refused by every command that reads it; so is a lost or swapped key."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from central import faults
from central.cli import main
from central.errors import StorageError
from central.fleet.pki import Pki
from central.heads import FILE, NOTE, Heads
from central.journal import EventKind, Journal, NewEvent, read_journal
from central.journal.events import FIRST_HASH, chain
from central.journal.table import row_of
from central.main import open_rooms
from central.registry import DirectoryBlobs
from central.settings import CentralSettings
from tests.contract import central_harness as harness
from tests.contract.s3 import BUCKET, S3
from tests.unit.central import builders as make

Run = Callable[..., tuple[int, str]]
EVENTS, OLD = 10, 8
"""Cohort, token, four nodes, four updates; and so many when the old copy was made."""


@dataclass(frozen=True)
class Prepared:
    """A central with four acknowledged updates; `old` is its database after the first two."""

    settings: CentralSettings
    old: Path


async def prepare(folder: Path) -> Prepared:
    settings = harness.make_settings(folder)
    async with harness.running_central(settings) as central:
        token = await central.token()
        nodes = [await central.enroll(name, token) for name in ("a", "b", "c", "d")]
        for number, node in enumerate(nodes[:2]):
            await node.upload(harness.encode_factors(number))
        old = folder / "old.db"
        with sqlite3.connect(settings.data_dir / "journal.db") as source, sqlite3.connect(old) as target:
            source.backup(target)
        for number, node in enumerate(nodes[2:], 2):
            await node.upload(harness.encode_factors(number))
    return Prepared(settings, old)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return asyncio.run(prepare(tmp_path_factory.mktemp("original")))


@pytest.fixture
def data(original: Prepared, tmp_path: Path) -> Path:
    """A copy of the data directory that the test may spoil."""
    return Path(shutil.copytree(original.settings.data_dir, tmp_path / "central"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(data_dir: Path, *arguments: str, **environment: str) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            for key, value in {"CENTRAL_DATA_DIR": str(data_dir), **environment}.items():
                patch.setenv(key, value)
            with pytest.raises(SystemExit) as ended:
                main(list(arguments))
        out, err = capsys.readouterr()
        return int(str(ended.value.code)), out + err

    return command


def start(original: Prepared, data: Path) -> int:
    """Open a central as `serve` does; returns its number of events."""
    settings = original.settings.model_copy(update={"data_dir": data})
    with ExitStack() as stack, open_rooms(settings, stack).journal.read() as state:
        return state.sequence


def events_of(data: Path) -> list[NewEvent]:
    stored = read_journal(f"sqlite:///{data}/journal.db")
    return [NewEvent(event.kind, event.cohort, event.subject, event.body) for event in stored]


def remove_database(data: Path) -> None:
    for file in data.glob("journal.db*"):
        file.unlink()


def rewrite(data: Path, events: list[NewEvent]) -> None:
    """What somebody with write access to the database does: any events he likes, with hashes that fit."""
    rows, previous = [], FIRST_HASH
    for number, new in enumerate(events, 1):
        event = chain(new, number, make.AT, previous)
        rows.append(row_of(event))
        previous = event.hash
    with sqlite3.connect(data / "journal.db") as database:
        database.execute("delete from events")
        columns = list(rows[0])
        marks = ", ".join("?" for _ in columns)
        database.executemany(
            f"insert into events ({', '.join(columns)}) values ({marks})", [tuple(row.values()) for row in rows]
        )


# What befalls a journal, and what is said of it.


def deleted(data: Path, original: Prepared) -> str:
    remove_database(data)
    return rf"The journal has no events, but central recorded event {EVENTS} .*Events 1 to {EVENTS} are missing"


def emptied(data: Path, original: Prepared) -> str:
    with sqlite3.connect(data / "journal.db") as database:
        database.execute("delete from events")
    return rf"The journal has no events, but .*Events 1 to {EVENTS} are missing"


def truncated_to_nothing(data: Path, original: Prepared) -> str:
    remove_database(data)
    (data / "journal.db").touch()
    return rf"The journal has no events, but .*Events 1 to {EVENTS} are missing"


def last_event_dropped(data: Path, original: Prepared) -> str:
    with sqlite3.connect(data / "journal.db") as database:
        database.execute("delete from events where sequence = (select max(sequence) from events)")
    return rf"The journal ends with event {EVENTS - 1}, but .*Event {EVENTS} is missing"


def older_file(data: Path, original: Prepared) -> str:
    remove_database(data)
    shutil.copy(original.old, data / "journal.db")
    return rf"The journal ends with event {OLD}, but .*Events {OLD + 1} to {EVENTS} are missing"


def older_file_and_head(data: Path, original: Prepared) -> str:
    """Database and head file together: the copy beside the blobs knows."""
    (data / FILE).unlink()
    return older_file(data, original)


def older_file_that_went_on(data: Path, original: Prepared) -> str:
    remove_database(data)
    shutil.copy(original.old, data / "journal.db")
    elsewhere = Heads(data / "nowhere", DirectoryBlobs(data / "nowhere"), Pki.load_or_create(data, []).release_key)
    (data / "nowhere").mkdir()
    journal = Journal(f"sqlite:///{data}/journal.db", seals=elsewhere)
    for number in range(5):
        journal.append(make.token_created("shared", f"later-{number}"))
    journal.close()
    return rf"Event {EVENTS} of the journal has hash \w+; central recorded it as"


def more_uses(data: Path, original: Prepared) -> str:
    events = events_of(data)
    (token,) = (number for number, event in enumerate(events) if event.kind is EventKind.TOKEN_CREATED)
    events[token] = NewEvent(
        events[token].kind, events[token].cohort, events[token].subject, {**events[token].body, "uses": 99}
    )
    rewrite(data, events)
    return rf"Event {EVENTS} of the journal has hash"


def update_removed(data: Path, original: Prepared) -> str:
    *others, _, last = events_of(data)
    rewrite(data, [*others, last])
    return rf"The journal ends with event {EVENTS - 1}, but"


def rewritten_and_longer(data: Path, original: Prepared) -> str:
    """Both heads are gone too: the missing seal shows it."""
    rewrite(data, [*events_of(data), make.token_created("shared", "own")])
    (data / FILE).unlink()
    (data / "blobs" / NOTE).unlink()
    return "no head of it is kept"


def both_heads_lost(data: Path, original: Prepared) -> str:
    (data / FILE).unlink()
    (data / "blobs" / NOTE).unlink()
    return rf"The journal ends with event {EVENTS}, and no head of it is kept"


def everything_but_blobs_lost(data: Path, original: Prepared) -> str:
    both_heads_lost(data, original)
    remove_database(data)
    return "has no events, though the blob store has blobs"


BEFALLS = [
    deleted, emptied, truncated_to_nothing, last_event_dropped, older_file, older_file_and_head, older_file_that_went_on, more_uses,
    update_removed, rewritten_and_longer, both_heads_lost, everything_but_blobs_lost,
]  # fmt: skip


@pytest.mark.parametrize("befall", BEFALLS)
def test_a_journal_that_lacks_what_was_acknowledged_is_refused_everywhere(
    original: Prepared, data: Path, tmp_path: Path, run: Run, befall: Callable[[Path, Prepared], str]
) -> None:
    expected = befall(data, original)
    for command in (["journal", "verify"], ["releases", "verify"], ["backup", str(tmp_path / "backups")]):
        code, text = run(data, *command)
        assert code == 5, (command, text)
        assert_matches(expected, text)
    before = kept_files(data)
    with pytest.raises(StorageError, match=f"(?s){expected}"):
        start(original, data)
    assert befall is not deleted or not (data / "journal.db").exists()
    assert kept_files(data) == before, "a start that is refused changes nothing"


def schema_damaged(path: Path) -> None:
    """SQLite's own message then quotes bytes that are no text."""
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE events", b"CREATE\xddTABLE events"))


def body_gone(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("create table other as select * from events")  # which no longer has to have a body
        database.execute("drop table events")
        database.execute("alter table other rename to events")
        database.execute("update events set body = null where sequence = 3")


@pytest.mark.parametrize("damage", [schema_damaged, body_gone], ids=lambda damage: damage.__name__)
def test_a_damaged_database_file_is_one_clear_error(
    original: Prepared, data: Path, run: Run, damage: Callable[[Path], None]
) -> None:
    with sqlite3.connect(data / "journal.db") as database:
        database.execute(f"vacuum into '{data / 'whole.db'}'")
    remove_database(data)
    (data / "whole.db").rename(data / "journal.db")
    damage(data / "journal.db")
    with pytest.raises(StorageError, match=r"cannot be (opened|read)"):
        start(original, data)
    code, text = run(data, "journal", "verify")
    assert code == 5
    assert_matches("cannot be (opened|read)", text)


def kept_files(data: Path) -> dict[Path, bytes]:
    """All but the database, the remembered digests of the base, and the spare bytes of a full disk."""
    left_out = ("journal.db", "base-digests.json", "room.ballast")
    files = (path for path in data.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if not path.name.startswith(left_out)}


def assert_matches(expected: str, text: str) -> None:
    assert re.search(expected, text, re.DOTALL), text


def test_an_undisturbed_journal_is_whole_and_ahead_of_its_head(original: Prepared, data: Path, run: Run) -> None:
    """A kill between a commit and its head leaves the journal ahead: nothing is lost then."""
    assert start(original, data) == EVENTS
    old = head_at(data, OLD)
    for place in (data / FILE, data / "blobs" / NOTE):
        place.write_bytes(old)
    for command in (["journal", "verify"], ["releases", "verify"]):
        assert run(data, *command)[0] == 0
    assert start(original, data) == EVENTS
    assert json.loads((data / FILE).read_bytes())["sequence"] == EVENTS, "it is written anew"


def head_at(data: Path, sequence: int) -> bytes:
    digest = next(event.hash for event in read_journal(f"sqlite:///{data}/journal.db") if event.sequence == sequence)
    heads = Heads(data, DirectoryBlobs(data / "blobs"), Pki.load_or_create(data, []).release_key)
    return heads.seal(sequence, digest).to_bytes()


async def test_a_postgresql_that_was_rolled_back_is_refused(tmp_path: Path, postgres: sa.URL, s3: S3) -> None:
    """Neither head lies in the database; with a new data directory the one in the bucket is left."""
    engines = {
        "journal": {"url": postgres.render_as_string(hide_password=False)},
        "blobs": {"url": f"s3://{BUCKET}/rolled-back", "options": s3.options},
    }
    settings = harness.make_settings(tmp_path, **engines)
    async with harness.running_central(settings) as central:
        token = await central.token()
        await central.enroll("a", token)
        await central.enroll("b", token)
    engine = sa.create_engine(postgres)
    with engine.begin() as connection:
        connection.execute(sa.text("delete from events where sequence = 4"))
    engine.dispose()
    for without_data_dir in (False, True):
        if without_data_dir:
            shutil.copytree(settings.data_dir / "pki", tmp_path / "pki")
            shutil.rmtree(settings.data_dir)
            settings.data_dir.mkdir()
            shutil.move(tmp_path / "pki", settings.data_dir / "pki")
        with pytest.raises(StorageError, match="ends with event 3, but central recorded event 4"), ExitStack() as stack:
            await asyncio.to_thread(open_rooms, settings, stack)


# The operator's word.


@pytest.mark.parametrize(
    "befall",
    [deleted, last_event_dropped, older_file, older_file_that_went_on, both_heads_lost, everything_but_blobs_lost],
)
def test_a_loss_is_accepted_by_one_command(
    original: Prepared, data: Path, run: Run, befall: Callable[[Path, Prepared], str]
) -> None:
    befall(data, original)
    head = (data / "blobs" / NOTE).read_bytes() if (data / "blobs" / NOTE).exists() else b""
    code, text = run(data, "journal", "accept-loss")
    assert (code, "Nothing was changed" in text) == (1, True), text
    with pytest.raises(StorageError):
        start(original, data)
    code, text = run(data, "journal", "accept-loss", "--yes")
    assert (code, "This is accepted" in text) == (0, True), text
    count = start(original, data)
    code, text = run(data, "journal", "verify", "--json")
    assert code == 0, text
    assert len(json.loads(text)["unnamed_blobs"]) == {1: 5, EVENTS: 1, EVENTS + 1: 0}.get(count, 2)
    *_, last = read_journal(f"sqlite:///{data}/journal.db")
    assert last.kind is EventKind.JOURNAL_LOSS_ACCEPTED
    if head:
        lost = json.loads(head)
        assert (last.body["sequence"], last.body["hash"]) == (lost["sequence"], lost["hash"])
    code, text = run(data, "journal", "accept-loss", "--yes")
    assert (code, "Nothing is missing" in text) == (0, True), text
    assert start(original, data) == count


@pytest.mark.parametrize("befall", [update_removed, rewritten_and_longer])
def test_a_forgery_is_never_accepted(
    original: Prepared, data: Path, run: Run, befall: Callable[[Path, Prepared], str]
) -> None:
    befall(data, original)
    code, text = run(data, "journal", "accept-loss", "--yes")
    assert (code, "is not signed by this central's release.key" in text) == (5, True), text
    with pytest.raises(StorageError):
        start(original, data)


@pytest.mark.parametrize(
    "fault", ["journal.journal_loss_accepted.applied#1", "journal.journal_loss_accepted.stored#1", "head.kept#1"]
)
def test_a_word_that_is_killed_is_given_again(original: Prepared, data: Path, run: Run, fault: str) -> None:
    older_file(data, original)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CENTRAL_")}
    done = subprocess.run(
        [sys.executable, "-m", "central.cli", "journal", "accept-loss", "--yes"], check=False, capture_output=True, timeout=60,
        env=environment | {"CENTRAL_DATA_DIR": str(data), faults.VARIABLE: fault},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(StorageError):
        start(original, data)
    code, text = run(data, "journal", "accept-loss", "--yes")
    assert code == 0, text
    assert start(original, data) > OLD


def test_a_directory_in_which_no_central_ran_has_no_loss(tmp_path: Path, run: Run) -> None:
    code, text = run(tmp_path, "journal", "accept-loss", "--yes")
    assert (code, "No central ran in" in text) == (5, True), text
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_store_that_is_handed_over_is_no_sign_of_a_loss(original: Prepared, data: Path, tmp_path: Path) -> None:
    for name in ("owner", NOTE):
        (data / "blobs" / name).unlink()
    settings = harness.make_settings(tmp_path / "second", blobs={"url": str(data / "blobs")})
    with ExitStack() as stack:
        open_rooms(settings, stack)
    with ExitStack() as stack:
        open_rooms(settings, stack)


# Signatures.


@pytest.mark.parametrize("kind", [EventKind.UPDATE_ADMITTED, EventKind.COHORT_CREATED])
def test_a_signature_that_central_never_checked_is_found(data: Path, run: Run, kind: EventKind) -> None:
    """Sealed by central's own key, as software with a fault would: `journal verify` checks what nodes and central signed."""
    events = events_of(data)
    number = next(number for number, event in enumerate(events) if event.kind is kind)
    events[number] = NewEvent(
        kind, events[number].cohort, events[number].subject, {**events[number].body, "signature": "bm9uc2Vuc2U="}
    )
    remove_database(data)
    heads = Heads(data, DirectoryBlobs(data / "blobs"), Pki.load_or_create(data, []).release_key)
    journal = Journal(f"sqlite:///{data}/journal.db", seals=heads)
    for event in events:
        journal.append(event)
    heads.start(journal)
    journal.close()
    code, text = run(data, "journal", "verify")
    assert code == 5
    assert_matches(rf"Journal event {number + 1} \({kind} of .* holds a signature that does not fit", text)


@pytest.mark.parametrize("place", [FILE, f"blobs/{NOTE}"])
def test_a_damaged_head_is_named_and_can_be_removed(original: Prepared, data: Path, run: Run, place: str) -> None:
    good = (data / place).read_bytes()
    for bad, text in ((b"\0" * 512, "is damaged"), (good.replace(b'"sequence":10', b'"sequence":11'), "is not signed")):
        (data / place).write_bytes(bad)
        for command in (["journal", "verify"], ["releases", "verify"]):
            code, said = run(data, *command)
            assert (code, text in said, str(data / place) in said) == (5, True, True), said
        with pytest.raises(StorageError, match=text):
            start(original, data)
    (data / place).unlink()
    assert start(original, data) == EVENTS
    assert (data / place).read_bytes() == good


# Restore.


def test_an_older_backup_is_not_restored_over_what_is_known_to_be_newer(
    original: Prepared, tmp_path: Path, run: Run
) -> None:
    blobs = tmp_path / "blobs"
    shutil.copytree(original.settings.data_dir / "blobs", blobs)
    place, old = {"CENTRAL_BLOBS__URL": str(blobs)}, tmp_path / "old"
    shutil.copytree(original.settings.data_dir, old)
    older_file(old, original)
    for stale in (old / FILE, old / "blobs" / NOTE):
        stale.unlink()
        stale.write_bytes(head_at(old, OLD))
    assert run(old, "backup", str(tmp_path / "backups"))[0] == 0
    code, text = run(tmp_path / "new", "restore", str(tmp_path / "backups"), **place)
    assert code == 5, text
    assert_matches("is older than what central recorded.*Events 9 to 10 are missing.*--accept-loss", text)
    assert [path.name for path in (tmp_path / "new").iterdir() if ".lock" not in path.name] == []
    code, text = run(tmp_path / "new", "restore", str(tmp_path / "backups"), "--accept-loss", **place)
    assert code == 0, text
    code, text = run(tmp_path / "new", "journal", "verify", "--json", **place)
    assert (code, json.loads(text)["events"], len(json.loads(text)["unnamed_blobs"])) == (0, OLD, 2), text


# Keys.


def write_key(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


@pytest.mark.parametrize("key", ["ca.key", "release.key"])
def test_a_lost_key_is_never_made_anew(original: Prepared, data: Path, run: Run, key: str) -> None:
    pki = data / "pki"
    kept = (pki / key).read_bytes()
    public = {"ca.key": "ca.pem", "release.key": "release.pub.pem"}[key]
    (pki / key).unlink()
    with pytest.raises(StorageError, match=rf"{key} is lost, and nodes trust no other.*Copy it there from a backup"):
        start(original, data)
    (pki / public).unlink()
    with pytest.raises(StorageError, match=rf"{key} is lost"):
        start(original, data)
    assert not (pki / key).exists()
    (pki / key).write_bytes(b"")
    with pytest.raises(StorageError, match=rf"{key} is not a private key"):
        start(original, data)
    (pki / key).write_bytes(kept)
    assert start(original, data) == EVENTS, "the public part is made of it again"


@pytest.mark.parametrize(("key", "public"), [("ca.key", "ca.pem"), ("release.key", "release.pub.pem")])
def test_another_key_in_its_place_is_refused(original: Prepared, data: Path, key: str, public: str) -> None:
    write_key(data / "pki" / key)
    with pytest.raises(StorageError, match=rf"{key} is not the key of .*{public}"):
        start(original, data)
    (data / "pki" / public).unlink()
    with pytest.raises(StorageError, match=r"not signed by this central's release\.key|those of another central"):
        start(original, data)


def test_without_any_key_a_central_with_a_history_does_not_start(original: Prepared, data: Path) -> None:
    shutil.rmtree(data / "pki")
    with pytest.raises(StorageError, match=r"ca\.key is lost"):
        start(original, data)
    assert list((data / "pki").glob("*")) == []


def test_keys_that_nobody_relies_on_are_made_anew(original: Prepared, data: Path) -> None:
    for name in ("server.key", "server.pem", "operator.key", "operator.pem"):
        (data / "pki" / name).unlink()
    assert start(original, data) == EVENTS


def test_the_release_key_is_a_p256_key(tmp_path: Path) -> None:
    Pki.load_or_create(tmp_path, [])
    key = ec.generate_private_key(ec.SECP384R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "pki" / "release.key").write_bytes(pem)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "pki" / "release.pub.pem").write_bytes(public)
    with pytest.raises(StorageError, match="expected an ECDSA P-256 key"):
        Pki.load_or_create(tmp_path, [])
