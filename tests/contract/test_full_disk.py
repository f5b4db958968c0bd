"""A full disk: uploads are refused for now, releases are served, retention makes room."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from central.errors import SettingsError, StorageFull
from central.faults import VARIABLE
from central.journal import EventKind, Journal, NewEvent
from central.journal.payloads import stored_blobs
from central.settings import CentralSettings
from central.space import Disk, Space
from lorikeet.ballast import BALLAST
from protos.lora import LoraModule, LoraTensors, encode
from protos.operators.v1 import operators_pb2
from protos.updates.v1 import updates_pb2
from tests.contract import central_harness as harness
from tests.contract.central_process import outside, process, ready
from tests.unit.central import builders as make

FULL = (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")


def payload_of(number: int) -> bytes:
    return harness.encode_factors(number)


async def kinds(central: harness.Central) -> list[EventKind]:
    events = await asyncio.to_thread(central.rooms.journal.events)
    return [event.kind for event in events]


async def test_superseding_updates_count_and_make_room_for_their_node(tmp_path: Path) -> None:
    """Each upload supersedes the one before: at most the quota is held, the node never stuck."""
    size = len(payload_of(0))
    quota = 4 * size + size // 2
    settings = harness.make_settings(tmp_path, limits={"node_quota_bytes": quota})
    async with harness.running_central(settings) as central:
        node = await central.enroll("a", await central.token())
        for number in range(1, 14):
            payload = payload_of(number)
            await node.upload(payload, node.manifest(payload, number))
            with central.rooms.journal.read() as state:
                assert state.kept_bytes(node.node_id) <= quota
            blobs = [
                path
                for path in (settings.data_dir / "blobs").glob("??/*")
                if path.stat().st_size == size
            ]
            assert len(blobs) <= 4
        recorded = await kinds(central)
        assert recorded.count(EventKind.BLOBS_COLLECTED) in range(2, 6), "not for every upload"
        listed = await central.operators.ListUpdates(operators_pb2.ListUpdatesRequest(), timeout=20)
        assert [update.state for update in listed.updates][-1] == 1, "the newest waits"


async def test_what_is_set_aside_counts_until_it_is_collected(tmp_path: Path) -> None:
    size = len(payload_of(0))
    settings = harness.make_settings(
        tmp_path, limits={"node_quota_bytes": 2 * size}, retention={"set_aside_days": 0}
    )
    async with harness.running_central(settings) as central:
        node = await central.enroll("a", await central.token())
        for number in (1, 2):
            payload = payload_of(number)
            manifest = node.manifest(payload, number)
            await node.upload(payload, manifest)
            aside = NewEvent(
                EventKind.UPDATE_SET_ASIDE, "shared", manifest.digest, {"reason": "a test"}
            )
            await asyncio.to_thread(central.rooms.journal.append, aside)
        third = node.upload(payload_of(3), node.manifest(payload_of(3), 3))
        status, reason, text = await harness.refusal(third)
        assert (status, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
        assert f"has {2 * size} bytes here that no release holds" in text
        await central.operators.CollectBlobs(
            operators_pb2.CollectBlobsRequest(apply=True), timeout=20
        )
        await node.upload(payload_of(3), node.manifest(payload_of(3), 3))


async def test_below_the_reserve_uploads_are_refused_and_everything_else_goes_on(
    tmp_path: Path,
) -> None:
    async with harness.running_central(harness.make_settings(tmp_path)) as central:
        node = await central.enroll("a", await central.token())
        first, second = payload_of(1), payload_of(2)
        await node.upload(first)
        await node.upload(second, node.manifest(second, 2))
        disk = Disk(100 << 30, 0, None)
        central.rooms.space._disk = lambda place: disk
        third = payload_of(3)
        status, reason, text = await harness.refusal(node.upload(third, node.manifest(third, 3)))
        assert (status, reason) == FULL
        assert "0 bytes are free" in text
        assert "expected 1073741824 to stay free (CENTRAL_LIMITS__RESERVE_BYTES)" in text
        assert "Try again later" in text
        with central.rooms.journal.read() as state:
            assert len(state.collected) == 1, "what is superseded went first"
        listed = await central.operators.ListReleases(
            operators_pb2.ListReleasesRequest(), timeout=20
        )
        (still,) = listed.standstills
        assert (still.cohort, len(listed.releases)) == ("", 1)
        assert "(since 20" in still.reason
        assert "`central retention --apply`" in still.reason
        disk = Disk(100 << 30, 50 << 30, 3)
        status, reason, text = await harness.refusal(node.upload(third, node.manifest(third, 3)))
        assert (status, reason, "3 files can still be made" in text) == (*FULL, True)
        disk = Disk(100 << 30, 50 << 30, 1000)
        await node.upload(third, node.manifest(third, 3))
        listed = await central.operators.ListReleases(
            operators_pb2.ListReleasesRequest(), timeout=20
        )
        assert not listed.standstills


async def test_a_disk_that_fills_while_an_upload_comes_keeps_what_came(tmp_path: Path) -> None:
    async with harness.running_central(harness.make_settings(tmp_path)) as central:
        node = await central.enroll("a", await central.token())
        payload = bytes(1000)
        free = [50 << 30]
        central.rooms.space._disk = lambda place: Disk(100 << 30, free[0], None)
        call = await node.begin(payload, stop=1)
        part = central.rooms.uploads.path(node.node_id, node.manifest(payload).digest)
        while not part.exists() or not part.stat().st_size:
            await asyncio.sleep(0.01)
        free[0] = 1 << 20
        await harness.write(call, updates_pb2.UploadRequest(chunk=payload[1:500]))
        assert (await harness.refusal(call))[:2] == FULL
        assert (await node.query(node.manifest(payload).digest)).committed_bytes == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
async def test_a_write_without_room_is_storage_full_and_nothing_is_lost(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness.running_central(harness.make_settings(tmp_path)) as central:
        node = await central.enroll("a", await central.token())
        payload = payload_of(1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", refuse(code))
            status, reason, text = await harness.refusal(node.upload(payload))
        assert (status, reason) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_FULL")
        assert "disk is full. Try again later" in text
        await node.upload(payload)


def refuse(code: int) -> object:
    def write(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return write


def test_the_reserve_is_a_twentieth_of_the_disk_and_at_most_1_gib(tmp_path: Path) -> None:
    def shortage(total: int, free: int, reserve: int | None = None) -> str:
        return Space([tmp_path], reserve, lambda place: Disk(total, free, None)).shortage()

    assert not shortage(64 << 20, 4 << 20), "a small volume works"
    assert "expected 3355443 to stay free" in shortage(64 << 20, 3 << 20)
    assert not shortage(1 << 40, 1 << 30)
    assert shortage(1 << 40, (1 << 30) - 1)
    assert not shortage(1 << 40, 0, reserve=0)
    assert "expected 500 to stay free" in shortage(1 << 40, 499, reserve=500)


# A file system of its own, filled to the last byte by somebody else.


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    place = tmp_path / "tmpfs"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> None:
    """Leave not a byte."""
    for piece in (1 << 16, 1 << 10, 1):
        with (place / "filler").open("ab", buffering=0) as stream, contextlib.suppress(OSError):
            while True:
                stream.write(bytes(piece))
    assert os.statvfs(place).f_bavail * os.statvfs(place).f_frsize < 4096


def on(place: Path, folder: Path) -> CentralSettings:
    settings = harness.make_settings(folder, retention={"superseded_days": 0})
    return settings.model_copy(update={"data_dir": place / "central"})


@pytest.mark.parametrize("engine", ["tmpfs", pytest.param("ext4", marks=pytest.mark.slow)])
async def test_central_starts_serves_and_collects_on_a_full_disk(
    engine: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = request.getfixturevalue(engine)
    settings = on(place, tmp_path)
    late = payload_of(99)
    async with process(settings, "serve") as first:
        await ready(first)
        async with outside(settings) as central:
            node = await send(central, 30)
            fill(place)
            first.kill()
            await first.wait()
            for _ in range(3):  # every start finds it full, and leaves the next one room
                async with process(settings, "serve") as again:
                    await ready(again)
                    await node.channel.channel_ready()
                    releases = await central.operators.ListReleases(
                        operators_pb2.ListReleasesRequest(), timeout=20
                    )
                    assert len(releases.releases) == 1
                    assert "bytes are free on the disk" in releases.standstills[0].reason
            async with process(settings, "serve") as last:
                await ready(last)
                await node.channel.channel_ready()
                fill(place)
                async with process(settings, "retention", "--apply") as command:
                    out, err = await asyncio.wait_for(command.communicate(), 60)
                assert (command.returncode, err) == (0, b"")
                assert b"Deleted 29 payloads" in out
                assert (await harness.refusal(node.upload(late, node.manifest(late, 99))))[
                    :2
                ] == FULL
                (place / "filler").unlink()
                await node.upload(late, node.manifest(late, 99))


@pytest.mark.slow
async def test_a_refused_upload_makes_room_by_itself_on_a_full_disk(
    tmpfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node's superseded updates fill the disk: the next upload is taken all the same."""
    monkeypatch.setattr(harness, "SHAPES", dict.fromkeys(harness.SHAPES, (1024, 2048)))
    settings = on(tmpfs, tmp_path)
    async with process(settings, "serve") as running:
        await ready(running)
        async with outside(settings) as central:
            node = await central.enroll("a", await central.token())
            for number in range(1, 21):
                payload = make_large(number)
                await node.upload(payload, node.manifest(payload, number, rank=64))
            updates = await central.operators.ListUpdates(
                operators_pb2.ListUpdatesRequest(), timeout=20
            )
    assert [update.state for update in updates.updates] == [4] * 19 + [1]


def make_large(seed: int) -> bytes:
    """An update of 1.5 MB; small values, because central bounds the norm of an increment."""
    modules = harness.make_factors(seed, 64).modules
    small = {
        name: LoraModule(np.float32(1e-2) * module.A, module.B, module.scale)
        for name, module in modules.items()
    }
    return encode(LoraTensors(small))


@pytest.mark.parametrize(
    "point",
    [
        "journal.blobs_collected.stored#1",
        *(
            pytest.param(p, marks=pytest.mark.slow)
            for p in ("space.ballast_released#2", "retention.deleted#1")
        ),
    ],
)
async def test_a_kill_within_retention_on_a_full_disk_loses_nothing(
    tmpfs: Path, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = on(tmpfs, tmp_path)
    async with process(settings, "serve") as first:
        await ready(first)
        async with outside(settings) as central:
            await send(central, 6)
    monkeypatch.setenv(VARIABLE, point)
    async with process(settings, "serve") as killed:
        await ready(killed)
        fill(tmpfs)
        async with process(settings, "retention", "--apply") as command:
            await asyncio.wait_for(command.communicate(), 60)
        await asyncio.wait_for(killed.wait(), 60)
    monkeypatch.delenv(VARIABLE)
    async with process(settings, "serve") as last:
        await ready(last)
        async with process(settings, "retention", "--apply") as command:
            await asyncio.wait_for(command.communicate(), 60)
        assert command.returncode == 0
    journal = Journal(settings.journal_url)
    with journal.read() as state:
        kept = [
            u
            for u in state.updates.values()
            if u.manifest.payload.digest_sha256 not in state.collected
        ]
        assert (len(state.updates), [update.state for update in kept]) == (6, ["waiting"])
        assert not state.collections
    journal.close()
    blobs = {path.name for path in (settings.data_dir / "blobs").glob("??/*")}
    assert blobs == set(stored_blobs(state))


async def send(central: harness.Central, count: int) -> harness.Node:
    """A node with so many updates, all but the last superseded."""
    node = await central.enroll("a", await central.token())
    for number in range(1, count + 1):
        payload = payload_of(number)
        await node.upload(payload, node.manifest(payload, number))
    return node


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Path]:
    """The same on a block device."""
    image, place = tmp_path / "image", tmp_path / "ext4"
    place.mkdir()
    with image.open("wb") as stream:
        stream.truncate(24 << 20)
    made = subprocess.run(
        ["mkfs.ext4", "-q", "-m", "0", "-F", str(image)], capture_output=True, check=False
    )
    mount = ["mount", "-o", "loop", str(image), str(place)]
    if made.returncode or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a loop device")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_the_journal_says_that_its_disk_is_full_and_goes_on_with_room(tmpfs: Path) -> None:
    journal = Journal(f"sqlite:///{tmpfs}/journal.db")
    make.start_cohort(journal)
    space = Space([tmpfs])
    space.take_ballast()
    assert (tmpfs / BALLAST).stat().st_blocks * 512 >= 256 << 10, "its blocks are allocated"
    fill(tmpfs)
    many = [make.token_created("shared", f"t-{number}") for number in range(1000)]
    with pytest.raises(StorageFull, match="database or disk is full"):
        journal.append(*many)
    space.release_ballast()
    journal.append(make.token_created("shared", "t-last"))
    journal.close()


def test_a_reserve_that_no_upload_could_leave_free_is_refused_at_start(tmp_path: Path) -> None:
    for reserve, disk in ((1 << 30, 1 << 30), (1 << 40, 1 << 30)):
        empty = Disk(disk, disk, None)
        space = Space([tmp_path], reserve, lambda place, empty=empty: empty)  # type: ignore[misc]
        with pytest.raises(SettingsError, match=f"CENTRAL_LIMITS__RESERVE_BYTES is {reserve}"):
            space.expect_possible()
    for reserve in (None, 0, (1 << 30) - 1):
        Space([tmp_path], reserve, lambda place: Disk(1 << 30, 0, None)).expect_possible()
