"""Identity: a bad join token is refused in words, files are whole, only the owner reads the key."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from edge_node.disk import write_file
from edge_node.errors import EnrollmentError, StorageError
from edge_node.identity import Identity, JoinToken, _own_key
from tests.fakes.identity import make_identity


def token(document: bytes) -> str:
    return "lkt1." + base64.urlsafe_b64encode(document).decode()


@pytest.mark.parametrize(
    "text",
    ["", "lkt1.", "lkt1.####", "hello", token(b"{}"), token(b"[" * 200_000)],
    ids=["empty", "prefix", "not base64", "word", "no fields", "nested too deeply"],
)
def test_unreadable_tokens_are_refused(text: str) -> None:
    with pytest.raises(EnrollmentError, match="central tokens create"):
        JoinToken.parse(text)


def test_a_token_with_another_thing_than_a_certificate_is_refused() -> None:
    body = base64.urlsafe_b64encode(
        json.dumps({"id": "a", "secret": "b", "ca": "no pem"}).encode()
    ).decode()
    with pytest.raises(EnrollmentError):
        JoinToken.parse("lkt1." + body)


def test_not_enrolled_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EnrollmentError, match="edge-node enroll"):
        Identity.load(tmp_path)


def test_the_key_is_made_once_and_private(tmp_path: Path) -> None:
    first = _own_key(tmp_path)
    assert (tmp_path / "node.key").stat().st_mode & 0o077 == 0
    assert _own_key(tmp_path).private_numbers() == first.private_numbers()


def test_writing_where_it_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="EDGE_DATA_DIR"):
        write_file(tmp_path / "file" / "x", b"1")


def test_a_replaced_file_is_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "x", b"one")
    write_file(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("identity.json", "garbage"),
        ("identity.json", "[]"),
        ("identity.json", "{}"),
        ("node.key", "x"),
        ("node.pem", "x"),
    ],
)
def test_a_damaged_identity_is_named(tmp_path: Path, file: str, content: str) -> None:
    made = make_identity(tmp_path)
    assert Identity.load(tmp_path).node_id == made.node_id
    (tmp_path / "identity" / file).write_text(content)
    with pytest.raises(StorageError, match="The identity in"):
        Identity.load(tmp_path)


def test_a_damaged_key_is_named_before_central_is_asked(tmp_path: Path) -> None:
    (tmp_path / "node.key").write_text("garbage")
    with pytest.raises(StorageError, match=r"cannot be read.*node\.key holds no private key"):
        _own_key(tmp_path)
