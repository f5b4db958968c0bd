"""`central backup` and `central restore`: a central that is destroyed and comes back, on either database; garbage; SIGKILL."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import central.storage.backup as backup_module
from central import faults
from central.cli import main
from central.errors import StorageError
from central.fleet.pki import Pki
from central.heads import Heads
from central.intake.partial import PartialUploads
from central.journal import Journal, verify_journal
from central.journal.payloads import stored_blobs
from central.main import open_rooms
from central.registry import BlobStore, DirectoryBlobs
from central.settings import CentralSettings, RetentionSettings
from central.storage.collector import Collector
from protos.releases.v1 import releases_pb2
from tests.contract import central_harness as harness
from tests.contract import cohort_loop as loop
from tests.contract.s3 import BUCKET, S3

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str]]


@dataclass(frozen=True)
class Prepared:
    """A central with two releases and one update that is set aside, not running, and its nodes."""

    settings: CentralSettings
    nodes: list[harness.Node]


async def prepare(folder: Path) -> Prepared:
    settings = harness.make_settings(folder)
    async with harness.running_central(settings) as running:
        token = await running.token()
        nodes = [await running.enroll(name, token) for name in ("a", "b")]
        rooms = running.rooms
        seen = loop.Central(rooms.journal, rooms.blobs, rooms.registry)  # type: ignore[arg-type]
        for number, node in enumerate(nodes):
            await node.upload(harness.encode_factors(number))
        await asyncio.to_thread(loop.take_steps, seen, loop.make_settings(), lambda: seen.head().manifest.version == 1)
        late = harness.encode_factors(7)
        await nodes[0].upload(late, nodes[0].manifest(late, 2))
    return Prepared(settings, nodes)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return asyncio.run(prepare(tmp_path_factory.mktemp("prepared")))


@pytest.fixture(scope="module")
def backups(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one backup; copied by whoever changes it."""
    directory = tmp_path_factory.mktemp("backups") / "of-central"
    done = process(prepared.settings, "backup", str(directory))
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process: (exit code, what it printed)."""

    def command(data_dir: Path, *arguments: str, **environment: str) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            for key, value in {"CENTRAL_DATA_DIR": str(data_dir), **environment}.items():
                patch.setenv(key, value)
            with pytest.raises(SystemExit) as ended:
                main(list(arguments))
        out, err = capsys.readouterr()
        return int(str(ended.value.code)), out + err

    return command


def process(settings: CentralSettings, *arguments: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CENTRAL_", faults.VARIABLE))}
    environment |= {"CENTRAL_DATA_DIR": str(settings.data_dir), **({faults.VARIABLE: fault} if fault else {})}
    return subprocess.run(
        [sys.executable, "-m", "central.cli", *arguments], cwd=ROOT, env=environment, timeout=60, check=False,
        capture_output=True, text=True,
    )  # fmt: skip


def newest(directory: Path) -> Path:
    return max((directory / "backups").iterdir())


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# There and back.


async def test_a_destroyed_central_comes_back_and_its_nodes_go_on(prepared: Prepared, tmp_path: Path, run: Run) -> None:
    settings = prepared.settings.model_copy(update={"data_dir": tmp_path / "central"})
    shutil.copytree(prepared.settings.data_dir, settings.data_dir)
    async with harness.running_central(settings):
        code, text = await asyncio.to_thread(run, settings.data_dir, "backup", str(tmp_path / "backups"), "--json")
    assert code == 0, text
    first = json.loads(text)
    assert (first["has_keys"], first["copied"]) == (True, first["blobs"])
    code, text = run(settings.data_dir, "backup", str(tmp_path / "backups"))
    assert code == 0
    assert "(0 of them new), with the private keys: guard it like them." in text
    key = newest(tmp_path / "backups") / "pki" / "ca.key"
    assert key.stat().st_mode & 0o777 == 0o600

    before, pki = verify_journal(settings.journal_url), files(settings.data_dir / "pki")
    shutil.rmtree(settings.data_dir)
    code, text = run(settings.data_dir, "restore", str(tmp_path / "backups"))
    assert (code, text.count("each one checked")) == (0, 1), text
    assert files(settings.data_dir / "pki") == pki
    after = verify_journal(settings.journal_url)
    assert (after.sequence, after.last_hash) == (before.sequence, before.last_hash)
    code, text = run(settings.data_dir, "releases", "verify", "v1-" + after.head("shared").release_id[:8], "--deep")  # type: ignore[union-attr]
    assert (code, text.count("identical")) == (0, 2), text

    async with harness.running_central(settings) as running:
        node = prepared.nodes[1]
        again = harness.Node(node.node_id, node.key, node.answer, running.channel(*identity(node)))
        answer = await again.releases.GetHead(releases_pb2.GetHeadRequest(channel="stable"), timeout=20)
        assert answer.head.manifest
        payload = harness.encode_factors(9)
        receipt = await again.upload(payload, again.manifest(payload, 2))
        assert receipt.signature
    assert verify_journal(settings.journal_url).sequence > before.sequence


def identity(node: harness.Node) -> tuple[bytes, bytes]:
    return node.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), node.answer.certificate_pem


def test_a_backup_of_sqlite_and_a_directory_restores_to_postgresql_and_s3(
    backups: Path, tmp_path: Path, run: Run, postgres: sa.URL, s3: S3
) -> None:
    engines = {
        "CENTRAL_JOURNAL__URL": postgres.render_as_string(hide_password=False),
        "CENTRAL_BLOBS__URL": f"s3://{BUCKET}/restored",
        "CENTRAL_BLOBS__OPTIONS": json.dumps(s3.options),
    }
    code, text = run(tmp_path / "new", "restore", str(backups), **engines)
    assert code == 0, text
    assert not (tmp_path / "new" / "journal.db").exists()
    code, text = run(tmp_path / "new", "releases", "verify", **engines)
    assert (code, text.count("identical")) == (0, 2), text
    code, text = run(tmp_path / "new", "backup", str(tmp_path / "back"), **engines)
    assert code == 0, text
    for name in ("journal.jsonl", "pki/ca.key"):
        assert (newest(tmp_path / "back") / name).read_bytes() == (newest(backups) / name).read_bytes()
    assert files(tmp_path / "back" / "blobs") == files(backups / "blobs")

    code, text = run(tmp_path / "newer", "restore", str(backups), **engines)
    assert code == 5
    assert "CENTRAL_JOURNAL__URL is not empty: its journal has" in text
    assert [path.name for path in (tmp_path / "newer").iterdir()] == ["central.lock"]
    execute(postgres, "drop table events")
    code, text = run(tmp_path / "newer", "restore", str(backups), **engines)
    assert code == 0, "the bucket outlived its central"


async def test_a_store_of_another_central_is_refused(
    prepared: Prepared, backups: Path, tmp_path: Path, run: Run, s3: S3
) -> None:
    bucket = {
        "CENTRAL_BLOBS__URL": f"s3://{BUCKET}/of-one-central",
        "CENTRAL_BLOBS__OPTIONS": json.dumps(s3.options),
    }
    shared = {"url": bucket["CENTRAL_BLOBS__URL"], "options": s3.options}
    async with harness.running_central(harness.make_settings(tmp_path, blobs=shared)):
        pass  # it has marked the bucket
    code, text = run(tmp_path / "new", "restore", str(backups), **bucket)
    assert (code, "are those of another central" in text) == (5, True), text
    assert s3.files.find(f"{BUCKET}/of-one-central") == [
        f"{BUCKET}/of-one-central/{name}" for name in ("head", "owner")
    ]
    shared = {"url": str(prepared.settings.data_dir / "blobs")}
    begun = prepared.settings.data_dir / "blobs" / "upload.tmp"
    begun.write_bytes(b"of the other central, which runs")
    with pytest.raises(StorageError, match=f"remove {prepared.settings.data_dir}/blobs/owner"), ExitStack() as stack:
        await asyncio.to_thread(open_rooms, harness.make_settings(tmp_path / "second", blobs=shared), stack)
    begun.unlink()  # and was left alone


def execute(url: sa.URL, statement: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()


def test_a_backup_without_keys_needs_the_kept_ones(prepared: Prepared, tmp_path: Path, run: Run) -> None:
    directory, new = tmp_path / "backups", tmp_path / "new"
    assert run(prepared.settings.data_dir, "backup", str(directory), "--without-keys")[0] == 0
    assert [path.name for path in newest(directory).rglob("*.key")] == []
    code, text = run(new, "restore", str(directory))
    assert (code, "Copy ca.key, server.key, release.key and operator.key there first" in text) == (5, True), text
    strangers = asyncio.run(prepare(tmp_path / "strangers")).settings.data_dir / "pki"
    shutil.copytree(strangers, new / "pki")
    code, text = run(new, "restore", str(directory))
    assert (code, "ca.key is another central's key" in text) == (5, True), text
    shutil.rmtree(new / "pki")
    shutil.copytree(prepared.settings.data_dir / "pki", new / "pki", ignore=shutil.ignore_patterns("*.pem"))
    code, text = run(new, "restore", str(directory))
    assert code == 0, text
    assert files(new / "pki") == files(prepared.settings.data_dir / "pki")


@pytest.mark.parametrize("during", [False, True], ids=["before it is copied", "while it is copied"])
def test_blobs_that_are_collected_meanwhile_are_not_missed(
    prepared: Prepared, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, during: bool
) -> None:
    data = tmp_path / "central"
    shutil.copytree(prepared.settings.data_dir, data)
    copy = backup_module.copy_blob
    (late,) = [
        update.manifest.payload.digest_sha256
        for update in verify_journal(f"sqlite:///{data}/journal.db").updates.values()
        if update.state == "set_aside"
    ]

    def collect_first(source: BlobStore, digest: str, target: BlobStore, scratch: Path) -> None:
        if during and digest != late:
            copy(source, digest, target, scratch)
            return
        monkeypatch.setattr(backup_module, "copy_blob", copy)
        with journal_of(data) as journal:
            uploads, policy = PartialUploads(data / "uploads"), RetentionSettings(set_aside_days=0)
            assert Collector(journal, DirectoryBlobs(data / "blobs"), uploads, policy).collect("tests").blobs
        copy(source, digest, target, scratch)

    monkeypatch.setattr(backup_module, "copy_blob", collect_first)
    code, text = run(data, "backup", str(tmp_path / "backups"))
    assert code == 0, text
    code, text = run(tmp_path / "new", "restore", str(tmp_path / "backups"))
    assert code == 0, text
    state = verify_journal(f"sqlite:///{tmp_path}/new/journal.db")
    assert len(state.collected) == 1


@contextmanager
def journal_of(data: Path) -> Iterator[Journal]:
    key = Pki.load_or_create(data, []).release_key
    journal = Journal(f"sqlite:///{data}/journal.db", seals=Heads(data, DirectoryBlobs(data / "blobs"), key))
    yield journal
    journal.close()


# Garbage.


def alter_line(directory: Path) -> str:
    path = newest(directory) / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    number = next(index for index, line in enumerate(lines) if b'"kind":"update_admitted"' in line)
    lines[number] = lines[number].replace(b'"cohort":"shared"', b'"cohort":"stolen"')
    path.write_bytes(b"".join(lines))
    return rf"journal.jsonl was altered: Journal event {number + 1} \(update_admitted of"


def cut_journal(directory: Path) -> str:
    path = newest(directory) / "journal.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    return r"has \d+ events, the last with hash .* its manifest says \d+"


def half_a_line(directory: Path) -> str:
    path = newest(directory) / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    return r"line \d+ is no event"


def alter_manifest(directory: Path) -> str:
    (newest(directory) / "manifest.json").write_text("{}")
    return r"manifest.json was altered"


def alter_key(directory: Path) -> str:
    (newest(directory) / "pki" / "release.key").write_text("other")
    return r"release.key was altered"


def lose_blob(directory: Path) -> str:
    blob = min(path for path in (directory / "blobs").rglob("*") if path.is_file())
    blob.unlink()
    return rf"1 of \d+ blobs of backup .* are missing, the first one {blob.name}"


def alter_blob(directory: Path) -> str:
    blob = max(path for path in (directory / "blobs").rglob("*") if path.is_file())
    blob.write_bytes(b"other")
    return rf"{blob.name} was altered: its digest is"


def half_a_backup(directory: Path) -> str:
    (path := newest(directory)).rename(path.with_name(f"{path.name}.tmp"))
    return r"has no finished backup. Its backups: .*\.tmp; what ends in .tmp was never finished"


def no_backup(directory: Path) -> str:
    shutil.rmtree(directory)
    return r"has no finished backup. Its backups: none"


@pytest.mark.parametrize(
    "spoil",
    [alter_line, cut_journal, half_a_line, alter_manifest, alter_key, lose_blob, alter_blob, half_a_backup, no_backup],
)
def test_a_spoilt_backup_is_refused_by_name(
    backups: Path, tmp_path: Path, run: Run, spoil: Callable[[Path], str]
) -> None:
    directory = tmp_path / "backups"
    shutil.copytree(backups, directory)
    expected = spoil(directory)
    for arguments in (["--check"], []):
        code, text = run(tmp_path / "new", "restore", str(directory), *arguments)
        assert code == 5, text
        assert re.search(expected, text), text
    assert not (tmp_path / "new" / "journal.db").exists()
    if spoil is not alter_blob:  # which is found while it is copied; the restore is unfinished then
        assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(prepared: Prepared, backups: Path, tmp_path: Path, run: Run) -> None:
    data = tmp_path / "central"
    shutil.copytree(prepared.settings.data_dir, data)
    before = files(data)
    code, text = run(data, "restore", str(backups))
    assert (code, "is not empty: it holds blobs, journal.db" in text) == (5, True), text
    assert files(data) == before
    for place in (data, data / "blobs" / "x", tmp_path):
        code, text = run(data, "backup", str(place))
        assert (code, "A backup cannot lie in" in text) == (5, True), text
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    code, text = run(data, "backup", str(tmp_path / "photos"))
    assert (code, "holds cat.jpg. Expected an empty or new directory" in text) == (5, True), text
    code, text = run(tmp_path / "nothing", "backup", str(tmp_path / "b"))
    assert code == 5, text


# Killed.


@pytest.mark.parametrize(
    "fault", ["backup.blob#2", pytest.param("backup.journal#1", marks=pytest.mark.slow), "backup.complete#1"]
)
def test_a_killed_backup_is_none(prepared: Prepared, tmp_path: Path, run: Run, fault: str) -> None:
    directory = tmp_path / "backups"
    assert process(prepared.settings, "backup", str(directory), fault=fault).returncode == -signal.SIGKILL
    code, text = run(tmp_path / "new", "restore", str(directory))
    assert (code, "never finished" in text) == (5, True), text
    code, text = run(prepared.settings.data_dir, "backup", str(directory))
    assert code == 0, text
    assert len(list((directory / "backups").iterdir())) == 1
    assert run(tmp_path / "new", "restore", str(directory), "--check")[0] == 0


@pytest.mark.parametrize(
    "fault",
    [
        "restore.blob#2",
        *(pytest.param(f"restore.{step}#1", marks=pytest.mark.slow) for step in ("begun", "keys", "journal")),
    ],
)
def test_a_killed_restore_goes_on(prepared: Prepared, backups: Path, tmp_path: Path, run: Run, fault: str) -> None:
    settings = prepared.settings.model_copy(update={"data_dir": tmp_path / "new"})
    assert process(settings, "restore", str(backups), fault=fault).returncode == -signal.SIGKILL
    base = {"CENTRAL_BASE__PATH": str(settings.base.path)}
    code, text = run(settings.data_dir, "serve", **base)
    assert (code, "was interrupted. Run the same `central restore` again" in text) == (5, True), text
    other = tmp_path / "other"
    assert run(prepared.settings.data_dir, "backup", str(other))[0] == 0
    code, text = run(settings.data_dir, "restore", str(other))
    assert (code, "unfinished restore of another backup" in text) == (5, True), text
    code, text = run(settings.data_dir, "restore", str(backups))
    assert code == 0, text
    assert files(settings.data_dir / "pki") == files(prepared.settings.data_dir / "pki")
    state, blobs = verify_journal(settings.journal_url), DirectoryBlobs(settings.data_dir / "blobs")
    for digest in stored_blobs(state):
        blobs.read(digest)
    assert state.last_hash == verify_journal(prepared.settings.journal_url).last_hash
    leftovers = {path.name for path in settings.data_dir.iterdir() if not path.name.startswith("journal.db-")}
    assert leftovers == {"blobs", "central.lock", "journal.db", "journal.db.lock", "journal.head", "pki"}
