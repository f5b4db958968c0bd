"""The real `central serve` on PostgreSQL and S3: one release; killed, it goes on; one writer."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from central.errors import StorageError
from central.journal import WriterLock, verify_journal
from central.settings import CentralSettings
from protos.lora import decode
from protos.manifest import ReleaseManifest
from protos.releases.v1 import releases_pb2
from tests.contract import central_harness as harness
from tests.contract.central_process import outside, ready
from tests.contract.s3 import BUCKET, S3

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Engines:
    journal: sa.URL
    s3: S3

    def environment(self, settings: CentralSettings) -> dict[str, str]:
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("CENTRAL_", "AWS_"))
        }
        return clean | {
            "CENTRAL_DATA_DIR": str(settings.data_dir),
            "CENTRAL_BASE__PATH": str(settings.base.path),
            "CENTRAL_LISTEN__PORT": str(settings.listen.port),
            "CENTRAL_LISTEN__ENROLLMENT_PORT": str(settings.listen.enrollment_port),
            "CENTRAL_JOURNAL__URL": self.journal.render_as_string(hide_password=False),
            "CENTRAL_BLOBS__URL": f"s3://{BUCKET}/engines",
            "CENTRAL_BLOBS__OPTIONS": f'{{"endpoint_url": "{self.s3.endpoint}"}}',
            "AWS_ACCESS_KEY_ID": self.s3.key,
            "AWS_SECRET_ACCESS_KEY": self.s3.secret,
            "CENTRAL_GATE__QUORUM": "0",
        }


@pytest.fixture
def engines(postgres: sa.URL, s3: S3) -> Engines:
    return Engines(postgres, s3)


@asynccontextmanager
async def process(
    engines: Engines, settings: CentralSettings, *arguments: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    running = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "central.cli", *arguments,
        cwd=ROOT, env=engines.environment(settings),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


async def head(node: harness.Node) -> ReleaseManifest:
    answer = await node.releases.GetHead(releases_pb2.GetHeadRequest(channel="stable"), timeout=20)
    return ReleaseManifest.from_bytes(answer.head.manifest)


async def test_a_release_on_postgresql_and_s3_survives_a_kill_and_has_one_writer(
    engines: Engines, tmp_path: Path
) -> None:
    settings = harness.make_settings(tmp_path)
    async with process(engines, settings, "serve") as first:
        await ready(first)
        async with outside(settings) as central:
            nodes = [await central.enroll(name, await central.token()) for name in ("a", "b")]
            payloads = [harness.encode_factors(seed) for seed in (0, 1)]
            for node, payload in zip(nodes, payloads, strict=True):
                await node.upload(payload)
            async with asyncio.timeout(60):
                while (released := await head(nodes[0])).version == 0:
                    await asyncio.sleep(0.05)

            elsewhere = settings.model_copy(
                update={
                    "data_dir": tmp_path / "other",
                    "listen": harness.make_settings(tmp_path).listen,
                }
            )
            async with process(engines, elsewhere, "serve") as second:
                _, err = await asyncio.wait_for(second.communicate(), 60)
            assert second.returncode == 5
            assert err.decode().startswith(
                "central: Another central writes to this journal (postgresql+psycopg://"
            )

            first.kill()
            await first.wait()
            async with process(engines, settings, "serve") as third:
                await ready(third)
                await nodes[1].channel.channel_ready()
                assert await head(nodes[1]) == released
                request = releases_pb2.DownloadRequest(release_id=released.digest, offset=7)
                stream = nodes[1].releases.Download(request, timeout=20)
                data = b"".join([part.chunk async for part in stream])
                assert len(data) == released.payload.size_bytes - 7

    stored = {Path(key).name for key in engines.s3.files.find(f"{BUCKET}/engines")}
    assert {
        released.payload.digest_sha256,
        *(node.manifest(p).payload.digest_sha256 for node, p in zip(nodes, payloads, strict=True)),
    } <= stored
    whole = engines.s3.files.cat_file(
        f"{BUCKET}/engines/{released.payload.digest_sha256[:2]}/{released.payload.digest_sha256}"
    )
    assert whole[7:] == data
    assert decode(whole).rank > 0
    assert not (settings.data_dir / "blobs").exists()
    state = verify_journal(engines.journal.render_as_string(hide_password=False))
    assert state.head("shared").release_id == released.digest  # type: ignore[union-attr]

    async with process(engines, settings, "releases", "verify", released.label, "--deep") as verify:
        out, err = await asyncio.wait_for(verify.communicate(), 60)
    assert (verify.returncode, out.decode().count("identical")) == (0, 2), err.decode()


def test_the_lock_of_postgresql_ends_with_its_holder(engines: Engines, tmp_path: Path) -> None:
    urls = (
        engines.journal.render_as_string(hide_password=False),
        f"sqlite:///{tmp_path}/journal.db",
    )
    for url in urls:
        with (
            WriterLock(url),
            pytest.raises(StorageError, match="Another central writes"),
            WriterLock(url),
        ):
            pass
        with WriterLock(url):
            pass
    with (
        pytest.raises(StorageError, match="cannot be opened"),
        WriterLock("postgresql+psycopg://127.0.0.1:9/none"),
    ):
        pass
