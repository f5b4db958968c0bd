"""`central releases export` on a loop's data directory: what PEFT loads is what was released."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from safetensors.numpy import load_file

from central.blobs import DirectoryBlobs
from central.cli import main
from protos.lora import LoraTensors, decode
from protos.manifest import sha256_hex
from tests.contract.cohort_loop import KEY, make_increment, make_settings, opened, take_steps


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    root = tmp_path / "central"
    (root / "pki").mkdir(parents=True)
    pem = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (root / "pki" / "release.pub.pem").write_bytes(pem)
    monkeypatch.setenv("CENTRAL_DATA_DIR", str(root))
    with opened(root) as central:
        central.join("shared", "a-1", "b-2")
        for number, node in enumerate(("a-1", "b-2")):
            central.admit(node, make_increment(10 + number), sequence=1)
        take_steps(central, make_settings(), lambda: central.head().manifest.version == 1)
    return root


def run(*arguments: str) -> object:
    with pytest.raises(SystemExit) as caught:
        main(["releases", "export", *arguments])
    return caught.value.code


def released(root: Path, description: dict[str, str]) -> LoraTensors:
    payload = json.loads(description["manifest"])["payload"]["digest_sha256"]
    return decode(DirectoryBlobs(root / "blobs").read(payload))


def label_of(root: Path, capsys: pytest.CaptureFixture[str], version: str) -> str:
    with pytest.raises(SystemExit):
        main(["releases", "verify", "--json"])
    rows = json.loads(capsys.readouterr().out)
    return next(row["version"] for row in rows if row["version"].startswith(version))


def test_the_adapter_is_the_release_and_says_what_it_is(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label, folder = label_of(data, capsys, "v1"), tmp_path / "out" / "adapter"
    before = sorted(data.rglob("*"))
    assert run(label, str(folder), "--json") == 0
    assert sorted(data.rglob("*")) == before, "nothing is written to central's directory"
    written = json.loads(capsys.readouterr().out)
    assert (written["release"], written["cohort"], written["state"]) == (
        label, "shared", "accepted",
    )  # fmt: skip
    description = json.loads((folder / "release.json").read_text())
    signed = description["manifest"].encode()
    assert sha256_hex(signed) == description["release"]
    signature = base64.b64decode(description["signature"])
    KEY.public_key().verify(signature, signed, ec.ECDSA(SHA256()))
    with pytest.raises(InvalidSignature):
        KEY.public_key().verify(signature, signed + b" ", ec.ECDSA(SHA256()))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"], "the scale is 1"
    arrays = load_file(folder / "adapter_model.safetensors")
    for name, module in released(data, description).modules.items():
        a, b = (arrays[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        np.testing.assert_array_equal(b @ a, (module.B * np.float32(module.scale)) @ module.A)
    assert sorted(each.name for each in folder.parent.iterdir()) == ["adapter"]


def test_what_cannot_be_exported_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label, genesis = label_of(data, capsys, "v1"), label_of(data, capsys, "v0")
    folder = tmp_path / "adapter"
    taken = tmp_path / "taken"
    taken.mkdir()
    for arguments, words in (
        ((genesis, folder), "is the base itself"),
        (("v7-00000000", folder), "is not known"),
        ((label, taken), "exists already"),
        ((label, data / "journal.db" / "x"), "cannot be written"),
    ):
        assert run(*map(str, arguments)) != 0
        assert words in capsys.readouterr().err
        assert not folder.exists()
    for blob in filter(Path.is_file, (data / "blobs").rglob("*")):
        blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    assert run(label, str(folder)) != 0
    assert "was altered" in capsys.readouterr().err
    assert not folder.exists()
