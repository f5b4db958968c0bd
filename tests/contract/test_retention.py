"""Retention with a real central: the command, uploads, verify, and SIGKILL at every step."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from central import faults
from central.blobs import DirectoryBlobs
from central.cli import main
from central.cohort.verify import verify_releases
from central.intake.admission import Admission
from central.intake.checks import check_manifest
from central.intake.uploads import Uploads
from central.journal import EventKind, NewEvent, verify_journal
from central.journal.payloads import stored_blobs
from central.retention.collector import Collector
from central.settings import CentralSettings, LimitSettings, RetentionSettings
from protos.manifest import UpdateManifest
from protos.operators.v1 import operators_pb2
from protos.releases.v1 import releases_pb2
from tests.contract import central_harness as harness
from tests.contract import cohort_loop as loop
from tests.contract import forgetting
from tests.contract.test_releases_verify import public_key, write_key
from tests.unit.central import builders as make

ROOT = Path(__file__).resolve().parents[2]
AT_ONCE = {"superseded_days": 0, "set_aside_days": 0, "rejected_days": 0}
QUICK = ("retention.deleted#1",)
EVERY = [f"{point}#1" for point in faults.RETENTION] + ["retention.deleted#2"]


async def superseded(node: harness.Node, count: int) -> list[UpdateManifest]:
    """`count` superseded updates and one that waits."""
    manifests = []
    for number in range(count + 1):
        payload = harness.encode_factors(number)
        manifests.append(node.manifest(payload, number + 1))
        await node.upload(payload, manifests[-1])
    return manifests


async def test_the_same_bytes_uploaded_beside_a_collection_are_never_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blob is there when the upload ends; it is collected before the journal has it."""
    settings = harness.make_settings(tmp_path, retention=AT_ONCE)
    async with harness.running_central(settings) as central:
        token = await central.token()
        node, other = await central.enroll("a", token), await central.enroll("b", token)
        old, _ = await superseded(node, 1)
        admit = Admission._admit

        def collect_first(*arguments: object) -> object:
            monkeypatch.setattr(Admission, "_admit", admit)
            assert len(central.rooms.collector.collect("tests").blobs) == 1
            return admit(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Admission, "_admit", collect_first)
        payload = harness.encode_factors(0)
        twin = other.manifest(payload, 1)
        assert twin.payload == old.payload
        status, reason, text = await harness.refusal(other.upload(payload, twin))
        assert (status, reason) == (grpc.StatusCode.ABORTED, "WRONG_OFFSET")
        assert "retention collected" in text
        assert (await other.query(twin.digest)).committed_bytes == len(payload)
        await other.upload(payload, twin, offset=len(payload))
        assert central.rooms.blobs.read(twin.payload.digest_sha256) == payload
        assert central.rooms.collector.collect("tests").blobs == ()


async def test_whoever_reads_a_collected_release_is_told_why(tmp_path: Path) -> None:
    async with harness.running_central(
        harness.make_settings(tmp_path, retention=AT_ONCE)
    ) as central:
        node = await central.enroll("a", await central.token())
        release_id, _ = await harness.make_candidate(central, node, harness.encode_factors())
        with central.rooms.journal.read() as state:
            rejected = state.releases[release_id].manifest
        await asyncio.to_thread(
            central.rooms.journal.append, make.decided(rejected, False, "fell in acme")
        )
        await asyncio.to_thread(central.rooms.collector.collect, "tests")
        diff = operators_pb2.DiffReleasesRequest(
            release_a=node.genesis.digest, release_b=release_id
        )
        download = releases_pb2.DownloadRequest(release_id=release_id)
        for call in (
            central.operators.DiffReleases(diff, timeout=20),
            node.releases.Download(download, timeout=20).read(),
        ):
            status, reason, text = await harness.refusal(call)
            assert (status, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_ACCEPTED")
            assert re.search(r"was collected on .* is rejected: fell in acme", text)


def central(settings: CentralSettings, *arguments: str, fault: str = "") -> subprocess.Popen[bytes]:
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("CENTRAL_", faults.VARIABLE))
    }
    environment |= {
        "CENTRAL_DATA_DIR": str(settings.data_dir),
        "CENTRAL_BASE__PATH": str(settings.base.path),
        "CENTRAL_LISTEN__PORT": str(settings.listen.port),
        "CENTRAL_LISTEN__ENROLLMENT_PORT": str(settings.listen.enrollment_port),
        "CENTRAL_MERGE__MIN_UPDATES": "99",
        **{f"CENTRAL_RETENTION__{name.upper()}": str(value) for name, value in AT_ONCE.items()},
        **({faults.VARIABLE: fault} if fault else {}),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "central.cli", *arguments], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ask(settings: CentralSettings, *arguments: str) -> tuple[int, str]:
    running = central(settings, *arguments)
    out, err = running.communicate(timeout=60)
    return running.returncode, out.decode() + err.decode()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> CentralSettings:
    """A central with three superseded updates, not running; copied for every test."""
    settings = harness.make_settings(tmp_path_factory.mktemp("retention"))

    async def prepare() -> None:
        async with harness.running_central(settings) as running:
            await superseded(await running.enroll("a", await running.token()), 3)

    asyncio.run(prepare())
    return settings


def check(prepared: CentralSettings, folder: Path, fault: str) -> None:
    shutil.copytree(prepared.data_dir, folder / "central")
    settings = prepared.model_copy(
        update={"data_dir": folder / "central", "listen": harness.make_settings(folder).listen}
    )
    serving = central(settings, "serve", fault=fault)
    try:
        assert serving.stdout is not None
        assert serving.stdout.readline().startswith(b"central is ready")
        code, text = ask(settings, "retention", "--json")
        preview = json.loads(text)
        assert (code, len(preview["blobs"])) == (0, 3)
        assert preview["total_bytes"] == sum(blob["size_bytes"] for blob in preview["blobs"]) > 0
        code, _ = ask(settings, "retention", "--apply")
        assert code == 4, "central was killed"
        assert serving.wait(30) == -signal.SIGKILL
        serving.communicate()

        serving = central(settings, "serve")
        assert serving.stdout is not None
        assert serving.stdout.readline().startswith(b"central is ready")
        code, text = ask(settings, "retention", "--apply")
        assert code == 0, text
        assert (
            ask(settings, "retention")[1]
            == "Would delete 0 payloads and 0 unfinished uploads, 0 bytes together.\n"
        )
    finally:
        serving.kill()
        serving.communicate()
    state = verify_journal(settings.journal_url)
    blobs = DirectoryBlobs(settings.data_dir / "blobs")
    assert state.collected.keys() == {blob["digest"] for blob in preview["blobs"]}
    assert not any(digest in blobs for digest in state.collected)
    assert state.collections == {}
    for digest in stored_blobs(state):
        blobs.read(digest)
    assert [len(update.reason) > 0 for update in state.updates.values()] == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("fault", QUICK)
def test_a_killed_collection_is_finished(
    prepared: CentralSettings, tmp_path: Path, fault: str
) -> None:
    check(prepared, tmp_path, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in EVERY if fault not in QUICK])
def test_every_fault_point_of_a_collection(
    prepared: CentralSettings, tmp_path: Path, fault: str
) -> None:
    check(prepared, tmp_path, fault)


def test_verify_says_that_a_rejected_candidate_was_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CENTRAL_DATA_DIR", str(tmp_path))
    bad = loop.result("acme", both=5, b=15, c=0, neither=0)
    with loop.opened(tmp_path) as running:
        running.join("shared", "a-1", "b-2")
        for sequence in (1, 2):
            for number, node in enumerate(("a-1", "b-2")):
                running.admit(node, loop.make_increment(10 * sequence + number), sequence=sequence)
            settings = loop.make_settings(quorum=sequence - 1)
            with loop.answering(running.journal, lambda node: ([bad], "")):
                loop.take_steps(
                    running,
                    settings,
                    lambda n=sequence: len(decided(running)) >= n,  # type: ignore[misc]
                )
        assert decided(running) == ["accepted", "rejected"]
        with running.journal.read() as state:
            for update in list(state.updates.values()):
                if update.state == "waiting":
                    body = {"reason": "a test"}
                    running.journal.append(
                        NewEvent(EventKind.UPDATE_SET_ASIDE, "shared", update.update_id, body)
                    )
        uploads = Uploads(tmp_path / "uploads")
        gone = (
            Collector(running.journal, running.blobs, uploads, RetentionSettings(**AT_ONCE))
            .collect("tests")
            .blobs
        )
        assert len(gone) == 3, "a candidate and its two updates"
    write_key(tmp_path, loop.KEY)
    with pytest.raises(SystemExit) as ended:
        main(["releases", "verify", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["outcome"] for row in rows] == ["identical", "identical", "collected"]
    assert re.search(
        r"payload \w{12} was collected on \d{4}-\d\d-\d\d \(update \w{12} of node a-1 is set aside",
        rows[2]["problem"],
    )
    assert ended.value.code == 0, "only what is reachable must be rebuilt"


def decided(running: loop.Central) -> list[str]:
    with running.journal.read() as state:
        return [
            release.state
            for release in state.releases.values()
            if release.manifest.version and release.verdict
        ]


@pytest.mark.parametrize("strategy", ["product-mean", "FedAdam"])
def test_what_was_forgotten_goes(tmp_path: Path, strategy: str) -> None:
    with loop.opened(tmp_path) as running:
        running.join("shared", *forgetting.NODES)
        ids = [forgetting.release(running, version, strategy=strategy)[1] for version in (1, 2)]
        order = forgetting.forget(running, "b-2")
        assert forgetting.run_until(running, order, strategy=strategy) == "done"
        forgetting.release(running, 4, ("a-1", "c-3"), strategy=strategy)
        uploads = Uploads(tmp_path / "uploads")
        Collector(running.journal, running.blobs, uploads, RetentionSettings(**AT_ONCE)).collect(
            "tests"
        )
        with running.journal.read() as state:
            gone = [
                state.updates[update].manifest.payload.digest_sha256 in state.collected
                for update in ids
            ]
            found = list(
                verify_releases(
                    state, state.releases.values(), running.blobs, public_key(loop.KEY), False
                )
            )
            deep = list(
                verify_releases(state, [running.head()], running.blobs, public_key(loop.KEY), True)
            )
            withdrawn = [
                release for release in state.releases.values() if release.state == "withdrawn"
            ]
            held = [
                release.manifest.payload.digest_sha256 not in state.collected
                for release in withdrawn
            ]
            start = state.releases[withdrawn[0].release_id].manifest
            late = make.make_update(start, "a-1", 9, base=state.nodes["a-1"].base)
            check_manifest(state, state.nodes["a-1"], late, late.base, LimitSettings())
        assert (gone, held) == ([True, True], [False, False])
        assert {finding.outcome for finding in found if finding.state == "accepted"} == {
            "identical"
        }
        assert {finding.outcome for finding in found + deep} <= {
            "identical",
            "forgotten",
            "collected",
        }
