"""A backup that is killed is none; a restore that is killed goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from central.blobs import DirectoryBlobs
from central.journal import verify_journal
from central.journal.payloads import stored_blobs
from tests.contract.backup.builders import Prepared, files, process
from tests.contract.central_harness import Run


@pytest.mark.parametrize(
    "fault",
    [
        "backup.blob#2",
        pytest.param("backup.journal#1", marks=pytest.mark.slow),
        "backup.complete#1",
    ],
)
def test_a_killed_backup_is_none(prepared: Prepared, tmp_path: Path, run: Run, fault: str) -> None:
    directory = tmp_path / "backups"
    assert (
        process(prepared.settings, "backup", str(directory), fault=fault).returncode
        == -signal.SIGKILL
    )
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
        *(
            pytest.param(f"restore.{step}#1", marks=pytest.mark.slow)
            for step in ("begun", "keys", "journal")
        ),
    ],
)
def test_a_killed_restore_goes_on(
    prepared: Prepared, backups: Path, tmp_path: Path, run: Run, fault: str
) -> None:
    settings = prepared.settings.model_copy(update={"data_dir": tmp_path / "new"})
    assert process(settings, "restore", str(backups), fault=fault).returncode == -signal.SIGKILL
    base = {"CENTRAL_BASE__PATH": str(settings.base.path)}
    code, text = run(settings.data_dir, "serve", **base)
    assert (code, "was interrupted. Run the same `central restore` again" in text) == (5, True), (
        text
    )
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
    leftovers = {
        path.name for path in settings.data_dir.iterdir() if not path.name.startswith("journal.db-")
    }
    assert leftovers == {
        "blobs",
        "central.lock",
        "journal.db",
        "journal.db.lock",
        "journal.head",
        "pki",
    }
