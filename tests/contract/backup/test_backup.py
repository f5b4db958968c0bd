"""`central backup` and `central restore`: a destroyed central comes back, on either database."""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa

import central.backup.backup as backup_module
from central.blobs import BlobStore, DirectoryBlobs
from central.errors import StorageError
from central.intake.uploads import Uploads
from central.journal import verify_journal
from central.retention.collector import Collector
from central.rooms import open_rooms
from central.settings import RetentionSettings
from protos.releases.v1 import releases_pb2
from tests.contract import central_harness as harness
from tests.contract.backup.builders import Prepared, files, identity, journal_of, newest, prepare
from tests.contract.central_harness import Run
from tests.contract.s3 import BUCKET, S3


async def test_a_destroyed_central_comes_back_and_its_nodes_go_on(
    prepared: Prepared, tmp_path: Path, run: Run
) -> None:
    settings = prepared.settings.model_copy(update={"data_dir": tmp_path / "central"})
    shutil.copytree(prepared.settings.data_dir, settings.data_dir)
    async with harness.running_central(settings):
        code, text = await asyncio.to_thread(
            run, settings.data_dir, "backup", str(tmp_path / "backups"), "--json"
        )
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
    code, text = run(
        settings.data_dir,
        "releases",
        "verify",
        "v1-" + after.head("shared").release_id[:8],
        "--deep",
    )  # type: ignore[union-attr]
    assert (code, text.count("identical")) == (0, 2), text

    async with harness.running_central(settings) as running:
        node = prepared.nodes[1]
        again = harness.Node(node.node_id, node.key, node.answer, running.channel(*identity(node)))
        answer = await again.releases.GetHead(
            releases_pb2.GetHeadRequest(channel="stable"), timeout=20
        )
        assert answer.head.manifest
        payload = harness.encode_factors(9)
        receipt = await again.upload(payload, again.manifest(payload, 2))
        assert receipt.signature
    assert verify_journal(settings.journal_url).sequence > before.sequence


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
        assert (newest(tmp_path / "back") / name).read_bytes() == (
            newest(backups) / name
        ).read_bytes()
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
    with (
        pytest.raises(StorageError, match=f"remove {prepared.settings.data_dir}/blobs/owner"),
        ExitStack() as stack,
    ):
        await asyncio.to_thread(
            open_rooms, harness.make_settings(tmp_path / "second", blobs=shared), stack
        )
    begun.unlink()  # and was left alone


def execute(url: sa.URL, statement: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()


def test_a_backup_without_keys_needs_the_kept_ones(
    prepared: Prepared, tmp_path: Path, run: Run
) -> None:
    directory, new = tmp_path / "backups", tmp_path / "new"
    assert run(prepared.settings.data_dir, "backup", str(directory), "--without-keys")[0] == 0
    assert [path.name for path in newest(directory).rglob("*.key")] == []
    code, text = run(new, "restore", str(directory))
    assert (code, "Copy ca.key, server.key, release.key and operator.key there first" in text) == (
        5,
        True,
    ), text
    strangers = asyncio.run(prepare(tmp_path / "strangers")).settings.data_dir / "pki"
    shutil.copytree(strangers, new / "pki")
    code, text = run(new, "restore", str(directory))
    assert (code, "ca.key is another central's key" in text) == (5, True), text
    shutil.rmtree(new / "pki")
    shutil.copytree(
        prepared.settings.data_dir / "pki", new / "pki", ignore=shutil.ignore_patterns("*.pem")
    )
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
            uploads, policy = Uploads(data / "uploads"), RetentionSettings(set_aside_days=0)
            assert (
                Collector(journal, DirectoryBlobs(data / "blobs"), uploads, policy)
                .collect("tests")
                .blobs
            )
        copy(source, digest, target, scratch)

    monkeypatch.setattr(backup_module, "copy_blob", collect_first)
    code, text = run(data, "backup", str(tmp_path / "backups"))
    assert code == 0, text
    code, text = run(tmp_path / "new", "restore", str(tmp_path / "backups"))
    assert code == 0, text
    state = verify_journal(f"sqlite:///{tmp_path}/new/journal.db")
    assert len(state.collected) == 1
