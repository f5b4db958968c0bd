"""An update whose blob is damaged or gone is set aside with the reason; the others are merged."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from central.blobs import BlobLost
from central.cohort.planning import PRODUCT_MEAN
from central.errors import Refused, StorageError
from central.operators.contributions import requeue
from tests.contract.cohort_loop import Central, make_settings, take_steps
from tests.contract.lost_blobs.damage import DAMAGE, admit, blob_of, flip, record, version


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    "merge",
    [
        {},
        {"filter": "near"},
        {"filter": "clip"},
        {"strategy": "FedAvg"},
        {"strategy": "FedAdam"},
        {"strategy": "Krum"},
    ],
    ids=lambda merge: "-".join(merge.values()) or PRODUCT_MEAN,
)
def test_a_damaged_payload_is_set_aside_and_the_others_are_merged(
    central: Central, how: str, merge: dict[str, Any]
) -> None:
    ids = admit(central)
    DAMAGE[how](blob_of(central, ids[1]), blob_of(central, ids[0]))
    take_steps(central, make_settings(min_updates=2, **merge), lambda: version(central) == 1)
    bad = record(central, ids[1])
    assert [record(central, u).state for u in ids] == ["merged", "set_aside", "merged"]
    assert f"Update {ids[1][:8]} cannot be merged: Blob " in bad.reason
    assert "from a backup" in bad.reason
    assert bad.lost
    with central.journal.read() as state:
        assert state.kept_bytes(bad.manifest.node_id) == 0, "it takes nothing of its node's quota"


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_payload_that_the_disk_does_not_give_is_set_aside(
    central: Central, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = admit(central)
    failing(monkeypatch, blob_of(central, ids[2]), code)
    take_steps(central, make_settings(min_updates=2), lambda: version(central) == 1)
    assert [record(central, u).state for u in ids] == ["merged", "merged", "set_aside"]
    assert "cannot be read" in record(central, ids[2]).reason


def failing(monkeypatch: pytest.MonkeyPatch, blob: Path, code: int) -> None:
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == blob:
            raise OSError(code, "no")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ETIMEDOUT, errno.ESTALE])
def test_what_passes_sets_nobody_aside(
    central: Central, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = admit(central)
    with monkeypatch.context() as patch:
        failing(patch, blob_of(central, ids[2]), code)
        with pytest.raises(StorageError):
            take_steps(central, make_settings(min_updates=2), lambda: version(central) == 1)
    take_steps(central, make_settings(min_updates=2), lambda: version(central) == 1)
    assert [record(central, u).state for u in ids] == ["merged"] * 3


@pytest.mark.parametrize("merge", [{}, {"filter": "near"}, {"strategy": "FedAvg"}], ids=str)
def test_a_store_that_is_away_sets_nobody_aside(
    central: Central, tmp_path: Path, merge: dict[str, Any]
) -> None:
    ids = admit(central)
    (tmp_path / "blobs").rename(tmp_path / "away")
    with pytest.raises(BlobLost, match=r"Blob .* is not at"):
        take_steps(central, make_settings(min_updates=2, **merge), lambda: version(central) == 1)
    (tmp_path / "away").rename(tmp_path / "blobs")
    take_steps(central, make_settings(min_updates=2, **merge), lambda: version(central) == 1)
    assert [record(central, u).state for u in ids] == ["merged"] * 3


def test_all_payloads_lost_one_after_the_other(central: Central) -> None:
    ids = admit(central)
    for update in ids[:2]:
        blob_of(central, update).unlink()
    take_steps(central, make_settings(min_updates=1), lambda: version(central) == 1)
    assert [record(central, u).state for u in ids] == ["set_aside", "set_aside", "merged"]


def test_a_lost_update_is_requeued_only_with_its_bytes(central: Central) -> None:
    ids = admit(central)
    path = blob_of(central, ids[1])
    data = path.read_bytes()
    flip(path, path)
    take_steps(central, make_settings(min_updates=2), lambda: version(central) == 1)
    with pytest.raises(Refused, match=r"still gone or damaged.*Restore the blob"):
        requeue(central.journal, central.blobs, [ids[1]], "operator")
    assert central.blobs.put(data) == path.name, "bytes that come again replace what is damaged"
    requeue(central.journal, central.blobs, [ids[1]], "operator")
    assert (record(central, ids[1]).state, record(central, ids[1]).lost) == ("waiting", False)
