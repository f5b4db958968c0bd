"""`edge-node keys`, as an operator types it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edge_node.cli import main


@pytest.fixture(autouse=True)
def data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for key in [key for key in os.environ if key.startswith("EDGE_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("EDGE_DATA_DIR", str(tmp_path / "node"))
    return tmp_path / "node"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["keys", *arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_a_key_is_made_shown_once_listed_and_ended(
    capsys: pytest.CaptureFixture[str], data_dir: Path
) -> None:
    code, out, err = run(capsys, "create", "app")
    assert (code, out.count("\n"), out.startswith("lk-")) == (0, 1, True)
    assert f"Key app (infer, feedback) is in {data_dir / 'keys.json'}" in err
    key = out.strip()
    code, out, _ = run(
        capsys, "create", "bob", "--scope", "feedback", "--scope", "admin", "--user", "b", "--json"
    )
    made = json.loads(out)
    assert (made["scopes"], made["user"]) == (["feedback", "admin"], "b")
    _, out, _ = run(capsys, "revoke", "bob")
    assert "Key bob is revoked" in out
    _, out, _ = run(capsys)
    first, second = out.splitlines()
    assert first.split()[:4] == ["app", "infer,", "feedback", "valid"]
    assert "revoked 20" in second
    assert "user b" in second
    _, out, _ = run(capsys, "list", "--json")
    assert [item["name"] for item in json.loads(out)] == ["app", "bob"]
    assert key not in out
    assert "sha256" not in out


def test_answers_to_a_key_need_not_be_kept(
    capsys: pytest.CaptureFixture[str], data_dir: Path
) -> None:
    run(capsys, "create", "app")
    code, out, _ = run(capsys, "create", "private", "--no-capture", "--json")
    assert (code, json.loads(out)["capture"]) == (0, False)
    _, out, _ = run(capsys)
    assert ["not captured" in line for line in out.splitlines()] == [False, True]
    _, out, _ = run(capsys, "list", "--json")
    assert [item["capture"] for item in json.loads(out)] == [True, False]
    file = data_dir / "keys.json"
    document = json.loads(file.read_text())
    for key in document["keys"]:
        del key["capture"]
    file.write_text(json.dumps(document))  # as earlier software wrote it
    _, out, _ = run(capsys, "list", "--json")
    assert [item["capture"] for item in json.loads(out)] == [True, True]


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], data_dir: Path) -> None:
    assert run(capsys, "list")[1].startswith(f"No keys in {data_dir / 'keys.json'}")
    assert not data_dir.exists(), "to look makes nothing"
    code, _, err = run(capsys, "revoke", "app")
    assert (code, "is not there, so it has no key 'app'" in err) == (1, True)
    assert not data_dir.exists(), "nor does a mistake"
    run(capsys, "create", "first")
    code, _, err = run(capsys, "create", "app", "--scope", "root")
    assert (code, "root" in err) == (2, True)
    (data_dir / "keys.json").write_text("{")
    code, _, err = run(capsys, "create", "app")
    assert (code, "is damaged" in err, err.count("\n")) == (5, True, 1)


def test_another_file_is_used_where_the_setting_says(
    capsys: pytest.CaptureFixture[str], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_SERVING__KEYS_FILE", str(data_dir.parent / "other.json"))
    assert run(capsys, "create", "app")[0] == 0
    assert (data_dir.parent / "other.json").exists()
    assert not data_dir.exists()
