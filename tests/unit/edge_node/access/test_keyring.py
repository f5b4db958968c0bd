"""What a serving process knows of the keys file: who is let in, and what is said when nobody is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from edge_node.access import Keyring, Scope, create_key, describe_access, keys_file, revoke_key
from edge_node.errors import EdgeError
from edge_node.problems import Problems
from edge_node.settings import EdgeSettings

INFER = [Scope.INFER]


def make(tmp_path: Path, **serving: Any) -> tuple[EdgeSettings, Keyring]:
    settings = EdgeSettings.model_validate({"data_dir": tmp_path / "node", "serving": serving})
    return settings, Keyring(settings, Problems(settings.data_dir))


def trouble(settings: EdgeSettings) -> str:
    found = [problem.text for problem in Problems(settings.data_dir).current()]
    assert len(found) < 2
    return found[0] if found else ""


@pytest.mark.parametrize(
    ("host", "access", "with_key", "required"),
    [
        ("127.0.0.1", "auto", False, False),
        ("127.0.0.1", "auto", True, True),
        ("::1", "auto", False, False),
        ("127.8.0.1", "auto", False, False),
        ("localhost", "auto", False, False),
        ("0.0.0.0", "auto", False, True),
        ("::", "auto", False, True),
        ("10.0.0.7", "auto", False, True),
        ("node.example.org", "auto", False, True),
        ("127.0.0.1", "required", False, True),
        ("0.0.0.0", "open", True, False),
        ("127.0.0.1", "open", True, False),
    ],
)
def test_when_a_key_is_required(
    tmp_path: Path, host: str, access: str, with_key: bool, required: bool
) -> None:
    if with_key:
        create_key(tmp_path / "node" / "keys.json", "app", INFER, None)
    settings, keyring = make(tmp_path, host=host, access=access)
    assert keyring.required == required
    nobody = required and not with_key
    assert ("every request gets 401" in trouble(settings)) == nobody
    if nobody:
        with pytest.raises(EdgeError, match="edge-node keys create NAME"):
            describe_access(settings)
    else:
        assert describe_access(settings).startswith("a key is" if required else "open")


def test_a_revoked_key_still_closes_the_door(tmp_path: Path) -> None:
    settings, keyring = make(tmp_path)
    key = create_key(keys_file(settings), "app", INFER, None)
    keyring.refresh()
    assert keyring.find(key.encode()) is not None
    assert keyring.find(key.encode()[:-1]) is None
    assert trouble(settings) == ""
    revoke_key(keys_file(settings), "app")
    keyring.refresh()
    assert (keyring.find(key.encode()), keyring.required) == (None, True)
    assert "holds no valid key" in trouble(settings)
    create_key(keys_file(settings), "app-2", INFER, None)
    keyring.refresh()
    assert trouble(settings) == ""


@pytest.mark.parametrize("damage", ["garbage", "gone", "folder"])
def test_a_damaged_file_never_opens_the_door(tmp_path: Path, damage: str) -> None:
    settings, keyring = make(tmp_path)
    path = keys_file(settings)
    key = create_key(path, "app", INFER, None)
    keyring.refresh()
    good = path.read_bytes()
    path.unlink()
    if damage == "garbage":
        path.write_text("{")
    elif damage == "folder":
        path.mkdir()
    keyring.refresh()
    assert keyring.required
    assert keyring.find(key.encode()) is not None, "the last good one stays"
    assert "The 1 keys that were read before stay valid" in trouble(settings)
    if damage != "gone":
        _, anew = make(tmp_path)
        assert (anew.required, anew.find(key.encode())) == (True, None)
        assert "Every request gets 401" in trouble(settings)
        with pytest.raises(EdgeError, match=str(path)):
            describe_access(settings)
    path.rmdir() if damage == "folder" else path.unlink(missing_ok=True)
    path.write_bytes(good)
    keyring.refresh()
    assert (trouble(settings), keyring.required) == ("", True)


def test_a_keys_file_that_was_named_and_is_not_there_closes_the_door(tmp_path: Path) -> None:
    settings, keyring = make(tmp_path, keys_file=tmp_path / "secret" / "keys.json")
    assert keyring.required
    assert "is not there. Every request gets 401" in trouble(settings)
    with pytest.raises(EdgeError, match="holds no valid one"):
        describe_access(settings)
    key = create_key(tmp_path / "secret" / "keys.json", "app", INFER, None)
    keyring.refresh()
    assert keyring.find(key.encode()) is not None


def test_a_file_that_was_named_and_is_empty_closes_the_door(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text('{"keys": []}')
    settings, keyring = make(tmp_path, keys_file=path)
    assert keyring.required
    assert "holds no valid key, so every request gets 401" in trouble(settings)


def test_the_door_is_shut_while_a_mended_file_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "node" / "keys.json"
    create_key(path, "app", INFER, None)
    good = path.read_bytes()
    path.write_text("{")
    _, keyring = make(tmp_path)
    path.write_bytes(good)
    seen: list[bool] = []

    def remember(self: Keyring, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        seen.append(self.required)

    monkeypatch.setattr(Keyring, "__setattr__", remember)
    keyring.refresh()
    assert len(seen) > 1
    assert all(seen), "at no moment may a request come in without a key"


def test_doctor_says_who_may_use_an_open_endpoint(tmp_path: Path) -> None:
    settings, _ = make(tmp_path, access="open")
    assert "everybody from this machine may ask and teach" in describe_access(settings)
    settings, _ = make(tmp_path, access="open", host="0.0.0.0")
    assert "everybody who reaches 0.0.0.0 may ask and teach" in describe_access(settings)


def test_a_new_key_counts_within_two_seconds(tmp_path: Path) -> None:
    settings, keyring = make(tmp_path)
    keyring.watch()
    try:
        key = create_key(keys_file(settings), "app", INFER, None)
        assert _within_2_s(lambda: keyring.find(key.encode()) is not None)
        revoke_key(keys_file(settings), "app")
        assert _within_2_s(lambda: keyring.find(key.encode()) is None)
    finally:
        keyring.close()


def _within_2_s(happened: Any) -> bool:
    deadline = time.monotonic() + 2
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
