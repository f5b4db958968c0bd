"""One contract for blob stores: a directory, memory, S3, and an fsspec that writes in place."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from central.blobs import BlobLost, BlobStore, DirectoryBlobs, open_blobs
from central.blobs.objects import PART_BYTES, ObjectBlobs
from central.blobs.store import OWNER
from central.errors import SettingsError, StorageError
from central.settings import CentralSettings
from protos.manifest import sha256_hex
from tests.contract.s3 import BUCKET, S3


class InPlace(LocalFileSystem):
    """A backend whose files can be seen while they are written."""

    protocol = "inplace"


@pytest.fixture(params=["directory", "memory", "s3", "inplace"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """An empty store that is ready."""
    name = f"{abs(hash(request.node.nodeid)):x}"
    found: BlobStore
    if request.param == "directory":
        found = DirectoryBlobs(tmp_path / "blobs")
    elif request.param == "s3":
        server: S3 = request.getfixturevalue("s3")
        found = ObjectBlobs(f"s3://{BUCKET}/{name}", server.options)
    elif request.param == "memory":
        found = ObjectBlobs(f"memory://{name}", {})
    else:
        fsspec.register_implementation("inplace", InPlace, clobber=True)
        found = ObjectBlobs(f"inplace://{tmp_path}/blobs", {})
    found.prepare()
    return found


def overwrite(store: BlobStore, digest: str, data: bytes) -> None:
    """What no central does."""
    if isinstance(store, DirectoryBlobs):
        store.path(digest).write_bytes(data)
    else:
        assert isinstance(store, ObjectBlobs)
        store._files.pipe_file(store._key(digest), data)


def test_bytes_come_back_by_their_digest(store: BlobStore) -> None:
    digest = store.put(b"payload")
    assert digest == sha256_hex(b"payload") == store.put(b"payload")
    assert (store.read(digest), store.size(digest), digest in store) == (b"payload", 7, True)
    assert store.read_range(digest, 2, 5) == b"ylo"
    empty = store.put(b"")
    assert (store.read(empty), store.size(empty)) == (b"", 0)


def test_a_finished_file_is_kept(store: BlobStore, tmp_path: Path) -> None:
    data = os.urandom(2 * PART_BYTES + 5)  # S3: in several parts
    digest = sha256_hex(data)
    for _ in range(2):
        (tmp_path / "upload").write_bytes(data)
        store.put_file(tmp_path / "upload", digest)
        (tmp_path / "upload").unlink()
    assert store.read(digest) == data
    assert store.read_range(digest, len(data) - 3, len(data)) == data[-3:]


def test_a_blob_that_lost_its_end_is_replaced(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(b"payload")
    digest = store.put(b"payload")
    overwrite(store, digest, b"pay")
    store.put_file(tmp_path / "upload", digest)
    assert store.read(digest) == b"payload"


@pytest.mark.parametrize("damage", [b"paylead", b"", b"other"])
def test_a_damaged_blob_is_told_from_a_whole_one_and_replaced(
    store: BlobStore, tmp_path: Path, damage: bytes
) -> None:
    digest = store.put(b"payload")
    assert store.holds(digest)
    for again in ("put", "put_file"):
        overwrite(store, digest, damage)
        assert not store.holds(digest)
        with pytest.raises(BlobLost):
            store.read(digest)
        (tmp_path / again).write_bytes(b"payload")
        assert (
            store.put(b"payload") == digest
            if again == "put"
            else store.put_file(tmp_path / again, digest) is None
        )
        assert store.read(digest) == b"payload"
    store.delete(digest)
    assert not store.holds(digest)


@pytest.mark.parametrize(
    ("error", "is_lost"), [(PermissionError("403"), True), (TimeoutError("slow"), False)]
)
def test_an_object_that_is_forbidden_is_lost_and_a_store_that_is_slow_is_away(
    error: OSError, is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 says 403 of an absent object to who may not list its bucket."""
    store = ObjectBlobs("memory://lost", {})
    digest = store.put(b"payload")

    def refuse(*_: object, **__: object) -> bytes:
        raise error

    monkeypatch.setattr(store._files, "cat_file", refuse)
    with pytest.raises(StorageError) as caught:
        store.read(digest)
    assert isinstance(caught.value, BlobLost) == is_lost


@pytest.mark.parametrize("left", [b"", b"x" * 400], ids=["empty", "short"])
def test_a_range_that_a_cut_blob_lacks_is_lost_and_not_away(store: BlobStore, left: bytes) -> None:
    """S3 refuses such a range with an error of its own."""
    digest = store.put(b"x" * 1000)
    overwrite(store, digest, left)
    with pytest.raises(BlobLost, match=rf"has {len(left)} bytes; expected at least 1000"):
        store.read_range(digest, 600, 1000)


def test_a_range_that_the_disk_does_not_give_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryBlobs(tmp_path)
    digest = store.put(b"payload")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BlobLost, match="cannot be read: bad sector"):
        store.read_range(digest, 0, 7)


def test_an_altered_or_absent_blob_is_an_error(store: BlobStore) -> None:
    digest = store.put(b"payload")
    overwrite(store, digest, b"other")
    with pytest.raises(StorageError, match="was altered"):
        store.read(digest)
    for call in (store.read, store.size, lambda digest: store.read_range(digest, 0, 1)):
        with pytest.raises(StorageError, match=f"Blob {'0' * 64} is not at .*0000. Restore"):
            call("0" * 64)
    assert "0" * 64 not in store


def test_a_deleted_blob_is_gone_and_can_come_again(store: BlobStore) -> None:
    digest = store.put(b"payload")
    for _ in range(2):
        store.delete(digest)
        assert digest not in store
    store.put(b"payload")
    assert store.read(digest) == b"payload"


def test_another_client_sees_what_was_put_and_deleted(store: BlobStore, s3: S3) -> None:
    if isinstance(store, DirectoryBlobs):
        other: BlobStore = DirectoryBlobs(store._root)
    else:
        assert isinstance(store, ObjectBlobs)
        other = ObjectBlobs(store._shown, s3.options if store._shown.startswith("s3") else {})
    assert sha256_hex(b"payload") not in other
    digest = store.put(b"payload")
    assert other.read(digest) == b"payload"
    other.delete(digest)
    assert digest not in store


def test_a_write_that_fails_is_not_seen(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a blob under its digest would be taken for the blob by the next `put`."""
    file = tmp_path / "upload"
    file.write_bytes(b"p" * (3 * PART_BYTES))
    digest = sha256_hex(file.read_bytes())
    if isinstance(store, ObjectBlobs):
        owner, name = type(store._files), "mv" if store._shown.startswith("inplace") else "put_file"
        if store._shown.startswith("s3"):
            owner, name = type(store._files), "_upload_file_part_concurrent"
    else:
        import central.blobs.directory as owner  # type: ignore[no-redef]

        name = "publish_link"

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(StorageError, match="No space left"):
            store.put_file(file, digest)
    assert digest not in store
    assert file.exists(), "it can be tried again"
    store.put_file(file, digest)
    assert store.size(digest) == 3 * PART_BYTES


def test_many_threads_put_the_same_and_other_blobs(store: BlobStore) -> None:
    found: list[str] = []

    def work(number: int) -> None:
        digest = store.put(b"same")
        assert store.read(digest) == b"same"
        found.append(store.put(b"%d" % number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [store.read(digest) for digest in sorted(found)] == [
        data
        for _, data in sorted((sha256_hex(b"%d" % number), b"%d" % number) for number in range(8))
    ]


def remove_mark(store: BlobStore) -> None:
    """What an operator does to hand a store over."""
    if isinstance(store, DirectoryBlobs):
        (store._root / OWNER).unlink()
    else:
        assert isinstance(store, ObjectBlobs)
        store._files.rm_file(f"{store._root}/{OWNER}")


def test_a_store_belongs_to_one_central(store: BlobStore) -> None:
    ours, theirs = "a" * 64, "b" * 64
    digest = store.put(b"of before there were marks")
    for _ in range(2):
        store.claim(ours)
    with pytest.raises(
        StorageError,
        match=r"those of another central.*'aaaaaaaaaaaa'.*'bbbbbbbbbbbb'.*remove .*/owner;",
    ):
        store.claim(theirs)
    store.prepare()
    store.claim(ours)
    assert store.read(digest) == b"of before there were marks"
    remove_mark(store)
    store.claim(theirs)
    with pytest.raises(StorageError, match="another central"):
        store.claim(ours)


def test_of_two_that_claim_at_once_the_later_mark_stays(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = store.write_note

    def overtaken(name: str, data: bytes) -> None:
        write(name, data)
        write(name, b"b" * 64)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_note", overtaken)
        with pytest.raises(StorageError, match="another central"):
            store.claim("a" * 64)
    store.claim("b" * 64)


# What an operator may get wrong.


def settings(url: str | None, tmp_path: Path, **options: object) -> CentralSettings:
    return CentralSettings.model_validate(
        {"data_dir": tmp_path, "blobs": {"url": url, "options": options}}
    )


@pytest.mark.parametrize("url", ["nowhere://x", "s3://", "simplecache::s3://x", "memory://"])
def test_a_url_that_is_none_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="CENTRAL_BLOBS__URL is"):
        open_blobs(settings(url, tmp_path))


def test_a_path_is_a_directory_on_any_disk(tmp_path: Path) -> None:
    for url in (str(tmp_path / "x"), f"file://{tmp_path}/x"):
        blobs = open_blobs(settings(url, tmp_path / "data"))
        blobs.prepare()
        assert isinstance(blobs, DirectoryBlobs)
        assert Path(blobs.where(blobs.put(b"payload"))).is_relative_to(tmp_path / "x")
    with pytest.raises(SettingsError, match="CENTRAL_BLOBS__OPTIONS"):
        open_blobs(settings(None, tmp_path, endpoint_url="http://127.0.0.1"))


def test_a_store_that_does_not_answer_or_refuses_is_one_clear_error(s3: S3, tmp_path: Path) -> None:
    no_bucket = open_blobs(settings("s3://no-such-bucket/x", tmp_path, **s3.options))
    with pytest.raises(
        StorageError,
        match=r"s3://no-such-bucket/x cannot be used: .*bucket does not exist.*CENTRAL_BLOBS__URL",
    ):
        no_bucket.prepare()
    nobody = {
        **s3.options,
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }
    with pytest.raises(StorageError, match="cannot be used"):
        open_blobs(settings(f"s3://{BUCKET}/x", tmp_path, **nobody)).prepare()
    secret = open_blobs(settings("memory://user:secret@host/x", tmp_path))
    assert "secret" not in secret.where("0" * 64)
