"""The keys file: what it holds, and what becomes of it when somebody or something fails."""

from __future__ import annotations

import hashlib
import json
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_node.access import Scope, create_key, read_keys, revoke_key
from edge_node.errors import EdgeError, SettingsError, StorageError
from lorikeet.locks import locked

ROOT = Path(__file__).resolve().parents[4]
BOTH = [Scope.INFER, Scope.FEEDBACK]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node" / "keys.json"


def test_the_file_holds_the_hash_and_not_the_key(path: Path) -> None:
    key = create_key(path, "app", BOTH, "alice")
    assert key.startswith("lk-")
    assert len(key) == len("lk-") + 43, "256 bits in base64"
    assert key not in path.read_text()
    (record,) = json.loads(path.read_text())["keys"]
    assert record["sha256"] == hashlib.sha256(key.encode()).hexdigest()
    assert (record["scopes"], record["user"]) == (["infer", "feedback"], "alice")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert create_key(path, "other", BOTH, None) != key
    assert [each.name for each in read_keys(path)] == ["app", "other"]


def test_a_revoked_key_stays_in_the_file_and_its_name_stays_taken(path: Path) -> None:
    create_key(path, "app", BOTH, None)
    first = revoke_key(path, "app")
    assert first.revoked is not None
    assert revoke_key(path, "app") == first, "once revoked, always since then"
    assert read_keys(path) == (first,)
    with pytest.raises(EdgeError, match="has a key 'app' already"):
        create_key(path, "app", BOTH, None)


@pytest.mark.parametrize(
    ("name", "user", "expected"),
    [
        ("", None, "key's name is ''. Expected at most 63"),
        ("a b", None, "key's name is 'a b'"),
        ("-x", None, "key's name is '-x'"),
        ("x" * 64, None, "Expected at most 63"),
        ("app", "", "key's user is ''. Expected 1 to 128"),
        ("app", "zoë", "key's user is 'zoë'"),
    ],
)
def test_an_impossible_name_or_user_changes_nothing(
    path: Path, name: str, user: str | None, expected: str
) -> None:
    create_key(path, "first", BOTH, None)
    before = path.read_bytes()
    with pytest.raises(SettingsError, match=expected):
        create_key(path, name, BOTH, user)
    assert path.read_bytes() == before


def test_an_unknown_name_is_told_with_those_that_there_are(path: Path) -> None:
    create_key(path, "app", BOTH, None)
    with pytest.raises(EdgeError, match=r"has no key 'ap'.* Names: app"):
        revoke_key(path, "ap")


GOOD = {
    "name": "app",
    "sha256": "ab" * 32,
    "scopes": ["infer"],
    "user": None,
    "created": "2026-11-27T00:00:00Z",
    "revoked": None,
}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "Invalid JSON"),
        (b'{"version": 1, "ke', "Invalid JSON"),
        (b"[]", "Input should be an object"),
        ({"version": 2, "keys": []}, "version"),
        ({"keys": [GOOD | {"expires": "2026-12-01"}]}, r"keys\.0\.an unknown field"),
        ({"keys": [{"lk-abc": "x"} | GOOD]}, r"keys\.0\.an unknown field"),
        ({"lk-abc": GOOD}, "an unknown field"),
        ({"keys": [GOOD | {"sha256": "lk-abc"}]}, r"keys\.0\.sha256"),
        ({"keys": [GOOD | {"scopes": []}]}, r"keys\.0\.scopes"),
        ({"keys": [GOOD | {"scopes": ["root"]}]}, r"keys\.0\.scopes\.0"),
        ({"keys": [GOOD | {"created": "2026-11-27T00:00:00"}]}, r"keys\.0\.created"),
        ({"keys": [GOOD, GOOD]}, "two keys have the name app"),
    ],
)
def test_a_damaged_file_is_named_not_quoted_and_not_written_over(
    path: Path, content: Any, expected: str
) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.parent.mkdir()
    path.write_bytes(data)
    for use in (read_keys, lambda path: create_key(path, "new", BOTH, None)):
        with pytest.raises(StorageError, match=f"is damaged: .*{expected}") as caught:
            use(path)
        assert "lk-abc" not in str(caught.value)
    assert path.read_bytes() == data


def test_a_good_file_of_another_hand_is_read(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps({"keys": [GOOD]}))
    assert [key.name for key in read_keys(path)] == ["app"]


def test_two_writers_do_not_lose_each_others_key(path: Path) -> None:
    create_key(path, "app", BOTH, None)
    with (
        locked(path.with_name("keys.json.lock")),
        pytest.raises(StorageError, match="Another `edge-node keys` writes"),
    ):
        create_key(path, "other", BOTH, None)
    assert [key.name for key in read_keys(path)] == ["app"]


def test_a_folder_that_cannot_be_written_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot be written: .*Kubernetes Secret is read-only"):
        create_key(tmp_path / "file" / "keys.json", "app", BOTH, None)


KILLED = """
import os, signal, sys
from pathlib import Path
from edge_node.access import Scope, create_key
from lorikeet import durable

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

step = sys.argv[2]
if step == "written":
    durable.os.fsync = killed
elif step == "synced":
    durable.publish = killed
else:
    durable.sync = killed
create_key(Path(sys.argv[1]), "new", [Scope.INFER], None)
"""


@pytest.mark.parametrize(
    ("step", "names"),
    [("written", ["old"]), ("synced", ["old"]), ("renamed", ["old", "new"])],
)
def test_a_kill_in_the_middle_leaves_the_old_or_the_new_file(
    path: Path, step: str, names: list[str]
) -> None:
    create_key(path, "old", BOTH, None)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), step], cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert [key.name for key in read_keys(path)] == names
    create_key(path, "next", BOTH, None)
    assert [key.name for key in read_keys(path)] == [*names, "next"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["keys.json", "keys.json.lock"]
