"""`central releases verify` on a loop's data directory: same, altered, missing, deep."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from central.blobs import DirectoryBlobs
from central.cli import main
from central.journal import Journal
from central.merging import ProductSum
from protos.lora import LoraModule, LoraTensors, encode
from tests.contract.cohort_loop import (
    KEY,
    Central,
    make_increment,
    make_settings,
    opened,
    take_steps,
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("CENTRAL_DATA_DIR", str(tmp_path))
    write_key(tmp_path, KEY)
    with opened(tmp_path) as central:
        central.join("shared", "a-1", "b-2")
        central.join("zeta", "d-4")
        for version, strategy in ((1, "product-mean"), (2, "FedAvg"), (3, "product-mean")):
            for number, node in enumerate(("a-1", "b-2")):
                central.admit(node, make_increment(10 * version + number), sequence=version)
            take_steps(
                central, make_settings(strategy=strategy), lambda v=version: head(central) == v
            )  # type: ignore[misc]
    return tmp_path


def head(central: Central) -> int:
    return central.head().manifest.version


def public_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def write_key(root: Path, key: ec.EllipticCurvePrivateKey) -> None:
    (root / "pki").mkdir(exist_ok=True)
    (root / "pki" / "release.pub.pem").write_bytes(public_key(key))


def run(*arguments: str) -> object:
    with pytest.raises(SystemExit) as caught:
        main(["releases", "verify", *arguments])
    return caught.value.code


def releases(root: Path) -> list:
    journal = Journal(f"sqlite:///{root}/journal.db")
    with journal.read() as state:
        found = [release for release in state.releases.values() if release.cohort == "shared"]
    journal.close()
    return found


def test_every_release_is_rebuilt_to_the_same_bytes(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = data / "blobs" / "of-a-running-central.tmp"
    unfinished.write_bytes(b"half")
    before = sorted(data.rglob("*"))
    assert run("--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["cohort"], row["version"][:2], row["outcome"]) for row in rows] == [
        ("shared", "v0", "identical"),
        ("zeta", "v0", "identical"),
        ("shared", "v1", "identical"),
        ("shared", "v2", "identical"),
        ("shared", "v3", "identical"),
    ]
    assert all(row["rebuilt"] == row["expected"] for row in rows)
    assert run("--cohort", "zeta") == 0
    assert capsys.readouterr().out.count("identical") == 1
    assert sorted(path for path in data.rglob("*") if "journal.db-" not in path.name) == before, (
        "it writes nothing"
    )


def test_deep_needs_the_updates_alone(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *before, last = releases(data)
    for release in before[1:]:
        DirectoryBlobs(data / "blobs").path(release.manifest.payload.digest_sha256).unlink()
    assert run(last.manifest.label) == 1, "its parent is not there"
    assert "Restore" in capsys.readouterr().out
    assert run(last.release_id[:8], "--deep", "--json") == 1
    rows = json.loads(capsys.readouterr().out)
    outcomes = {"v0": "identical", "v1": "damaged", "v2": "damaged", "v3": "identical"}
    assert {row["version"][:2]: row["outcome"] for row in rows} == outcomes
    assert all(row["rebuilt"] == row["expected"] for row in rows), "what is gone can be made again"


@pytest.mark.parametrize("damage", ["flipped", "swapped", "gone"])
@pytest.mark.parametrize("deep", [False, True])
def test_what_would_be_served_is_read(
    data: Path, capsys: pytest.CaptureFixture[str], damage: str, deep: bool
) -> None:
    head = releases(data)[-1]
    blobs = DirectoryBlobs(data / "blobs")
    file = blobs.path(head.manifest.payload.digest_sha256)
    other = blobs.path(releases(data)[-2].manifest.payload.digest_sha256)
    if damage == "gone":
        file.unlink()
    else:
        good = file.read_bytes()
        file.write_bytes(
            other.read_bytes() if damage == "swapped" else good[:-1] + bytes([good[-1] ^ 1])
        )
    assert run(head.manifest.label, "--json", *(["--deep"] if deep else [])) == 1
    captured = capsys.readouterr()
    *before, last = json.loads(captured.out)
    assert [row["outcome"] for row in before] == ["identical"] * len(before)
    assert (last["outcome"], last["rebuilt"]) == ("damaged", last["expected"])
    assert head.manifest.payload.digest_sha256 in last["problem"]
    assert (
        f"releases are damaged or could not be rebuilt to the same bytes: {head.manifest.label}"
        in captured.err
    )


def test_another_update_or_another_key_is_found(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blobs = DirectoryBlobs(data / "blobs")
    first = releases(data)[1]
    journal = Journal(f"sqlite:///{data}/journal.db")
    with journal.read() as state:
        update = state.updates[first.manifest.updates[0]].manifest.payload.digest_sha256
    journal.close()
    kept = blobs.path(update).read_bytes()
    blobs.path(update).write_bytes(encode(make_increment(99)))
    assert run(first.manifest.label) == 1
    captured = capsys.readouterr()
    assert "was altered" in captured.out
    assert (
        "1 of 1 releases are damaged or could not be rebuilt to the same bytes: "
        f"{first.manifest.label}" in captured.err
    )
    blobs.path(update).write_bytes(kept)
    assert run(first.manifest.label) == 0
    write_key(data, ec.generate_private_key(ec.SECP256R1()))
    capsys.readouterr()
    assert run(first.manifest.label) == 5
    assert "is not signed by this central's release.key" in capsys.readouterr().err


def test_a_merge_that_makes_other_bytes_is_found(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from central.cohort.strategies.product_mean import ProductMean

    honest = ProductMean._parent

    def of_rank_one(self: ProductMean) -> ProductSum:
        self._plan = self._plan.model_copy(update={"rank": 1})
        return honest(self)

    monkeypatch.setattr(ProductMean, "_parent", of_rank_one)
    assert run("--cohort", "shared", "--json") == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["outcome"] for row in rows] == ["identical", "differs", "differs", "differs"]
    assert rows[1]["rebuilt"] != rows[1]["expected"]


def test_what_is_not_there_is_one_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("v9-00000000") == 1
    assert "is not known" in capsys.readouterr().err
    assert run("--cohort", "none") == 1
    assert "Cohort 'none' is not known" in capsys.readouterr().err
    shutil.rmtree(data / "pki")
    assert run() == 5
    assert "CENTRAL_DATA_DIR" in capsys.readouterr().err


def test_the_environment_does_not_change_a_bit(tmp_path: Path) -> None:
    """The merge is so large that two threads would round otherwise than one.

    It says `differs` where the merge is not bound to one thread.

    OPENBLAS_CORETYPE is kept where a machine sets it: it makes the processor another one
    (docs/merging.md).
    """
    write_key(tmp_path, KEY)
    with opened(tmp_path) as central:
        central.join("shared", "a-1", "b-2")
        for number, node in enumerate(("a-1", "b-2")):
            central.admit(node, large_increment(number))
        take_steps(central, make_settings(rank=64), lambda: head(central) == 1)
    for threads in ("1", "2"):
        threads_of_blas = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS")
        clean = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith("CENTRAL_") and k not in threads_of_blas
        }
        done = subprocess.run(
            [sys.executable, "-m", "central.cli", "releases", "verify", "--json"],
            env=clean | {"CENTRAL_DATA_DIR": str(tmp_path), "OMP_NUM_THREADS": threads},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert [row["outcome"] for row in json.loads(done.stdout)] == ["identical", "identical"], (
            threads
        )


def large_increment(seed: int) -> LoraTensors:
    rng = np.random.default_rng(seed)
    return LoraTensors(
        {
            name: LoraModule(
                rng.standard_normal((128, 4096), np.float32),
                rng.standard_normal((512, 128), np.float32),
                1.0,
            )
            for name in ("layers.0.q", "layers.0.v")
        }
    )
