"""The real `central serve`: killed in the middle of an upload and after it, it loses and doubles nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from central.errors import SettingsError, StorageError
from central.file_lock import DataLock
from central.fleet.pki import Pki
from central.intake.direct import WINDOW_BYTES
from central.journal import Journal
from central.settings import CentralSettings
from edge_node.identity import JoinToken
from protos.base import read_base_model
from protos.manifest import CHUNK_BYTES, sign
from protos.updates.v1 import updates_pb2
from tests.contract import central_harness as harness
from tests.fakes.base_models import make

ROOT = Path(__file__).resolve().parents[2]


@asynccontextmanager
async def process(
    settings: CentralSettings, *arguments: str, files: int = 0, **more: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`central` with these arguments; `more` are settings by the rest of their names. `files`: how
    many the process may open at most; 0: as many as this one.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CENTRAL_")}
    environment |= {
        "CENTRAL_DATA_DIR": str(settings.data_dir),
        "CENTRAL_BASE__PATH": str(settings.base.path),
        "CENTRAL_LISTEN__PORT": str(settings.listen.port),
        "CENTRAL_LISTEN__ENROLLMENT_PORT": str(settings.listen.enrollment_port),
        "CENTRAL_MERGE__MIN_UPDATES": "99",
        "CENTRAL_RETENTION__SUPERSEDED_DAYS": str(settings.retention.superseded_days),
        **{f"CENTRAL_{name}": value for name, value in more.items()},
    }
    limited = ["bash", "-c", f'ulimit -n {files} && exec "$@"', "central"] if files else []
    running = await asyncio.create_subprocess_exec(
        *limited, sys.executable, "-m", "central.cli", *arguments,
        cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


async def ready(running: asyncio.subprocess.Process) -> None:
    assert running.stdout is not None
    line = (await asyncio.wait_for(running.stdout.readline(), 60)).decode()
    assert line.startswith("central is ready on "), line


@asynccontextmanager
async def outside(settings: CentralSettings) -> AsyncIterator[harness.Central]:
    """The process seen from outside: only its certificates are read."""

    class Seen:
        pki = Pki.load_or_create(settings.data_dir, [])
        base = read_base_model(settings.base.path or Path())

    async with AsyncExitStack() as stack:
        yield harness.Central(Seen(), settings, stack)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "said"),
    [({"num_experts": 8}, "a mixture of experts"), ({"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)")],
)  # fmt: skip
async def test_a_base_that_cannot_work_is_refused_at_the_start(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    settings = harness.make_settings(tmp_path)
    path = settings.base.path or Path()
    shutil.rmtree(path)
    make(path, **config)
    async with process(settings, "serve") as running:
        _, errors = await asyncio.wait_for(running.communicate(), 60)
    assert running.returncode == SettingsError.exit_code
    assert f"CENTRAL_BASE__PATH is not usable. Base model {path} does not work here" in errors.decode()
    assert said in errors.decode()
    assert not (settings.data_dir / "journal.db").exists()


async def test_a_killed_central_goes_on_where_it_was(tmp_path: Path) -> None:
    settings = harness.make_settings(tmp_path)
    payload = harness.encode_factors()
    async with process(settings, "serve") as first:
        await ready(first)
        with pytest.raises(StorageError, match="Another central runs"), DataLock(settings.data_dir):
            pass
        async with outside(settings) as central:
            node = await central.enroll("a", await central.token())
            with pytest.raises(grpc.aio.AioRpcError):
                await node.upload(payload, stop=600)
            first.kill()
            await first.wait()

            async with process(settings, "serve") as second:
                await ready(second)
                manifest = node.manifest(payload)
                await node.channel.channel_ready()
                assert (await node.query(manifest.digest)).committed_bytes == 600
                receipt = await node.upload(payload, manifest, offset=600)
                second.kill()
                await second.wait()

            async with process(settings, "serve") as third:
                await ready(third)
                await node.channel.channel_ready()
                assert await node.upload(payload, manifest) == receipt
                third.send_signal(signal.SIGTERM)
                assert await asyncio.wait_for(third.wait(), 30) == 0
    journal = Journal(f"sqlite:///{settings.data_dir}/journal.db")
    with journal.read() as state:
        assert [update.update_id for update in state.waiting("shared")] == [manifest.digest]
        assert state.cohorts() == ["shared"]


async def test_a_kill_within_an_upload_costs_less_than_a_window(tmp_path: Path) -> None:
    settings = harness.make_settings(tmp_path)
    payload = bytes(4 * WINDOW_BYTES)
    sent = 2 * WINDOW_BYTES + WINDOW_BYTES // 2
    async with process(settings, "serve") as first:
        await ready(first)
        async with outside(settings) as central:
            node = await central.enroll("a", await central.token())
            manifest = node.manifest(payload)
            call = node.updates.Upload(timeout=60)
            header = updates_pb2.UploadHeader(
                manifest=manifest.to_bytes(), signature=sign(node.key, manifest.to_bytes())
            )
            await call.write(updates_pb2.UploadRequest(header=header))
            for begin in range(0, sent, CHUNK_BYTES):
                await call.write(updates_pb2.UploadRequest(chunk=payload[begin : min(begin + CHUNK_BYTES, sent)]))
            part = settings.data_dir / "uploads" / node.node_id / f"{manifest.digest}.part"
            while not part.exists() or part.stat().st_size < 2 * WINDOW_BYTES:
                await asyncio.sleep(0.01)
            first.kill()
            await first.wait()
            with pytest.raises(grpc.aio.AioRpcError):
                await call
            async with process(settings, "serve") as second:
                await ready(second)
                await node.channel.channel_ready()
                assert (await node.query(manifest.digest)).committed_bytes == 2 * WINDOW_BYTES


async def test_what_anybody_may_do_fills_no_log(tmp_path: Path) -> None:
    """Wrong tokens, no TLS, TLS without a certificate: a few lines each, however many there are."""
    settings = harness.make_settings(tmp_path)
    ports = (settings.listen.port, settings.listen.enrollment_port)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with process(settings, "serve") as central:
        await ready(central)
        async with outside(settings) as seen:
            token = await seen.token()
        wrong = JoinToken(token.token_id, "wrong", token.ca_pem)
        key = ec.generate_private_key(ec.SECP256R1())
        address = f"localhost:{settings.listen.enrollment_port}"
        guesses = [asyncio.create_task(harness.join(address, "x", wrong, key)) for _ in range(20)]
        for number in range(40):
            with suppress(OSError):
                tls = context if number % 2 else None
                _, writer = await asyncio.open_connection("127.0.0.1", ports[number // 2 % 2], ssl=tls)
                writer.write(b"GET / HTTP/1.1\r\n\r\n")
                writer.close()
        await asyncio.wait(guesses, timeout=2)
        for guess in guesses:
            guess.cancel()
        await asyncio.gather(*guesses, return_exceptions=True)
        central.kill()
        _, log = await central.communicate()
    lines = log.decode().splitlines()
    assert len([line for line in lines if "BAD_TOKEN" in line]) == 1
    assert not [line for line in lines if "andshake" in line]


async def test_a_taken_port_is_one_line_and_exit_code_6(tmp_path: Path) -> None:
    settings = harness.make_settings(tmp_path)

    async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    other = await asyncio.start_server(drop, "127.0.0.1", settings.listen.enrollment_port)
    async with other, process(settings, "serve") as central:
        out, err = await asyncio.wait_for(central.communicate(), 60)
    assert (central.returncode, out) == (6, b"")
    assert err.decode().splitlines() == [
        f"central: Central cannot listen on 127.0.0.1:{settings.listen.enrollment_port}: Address already in use. Stop the "
        "program that has the port, or set CENTRAL_LISTEN__ENROLLMENT_PORT or CENTRAL_LISTEN__HOST."
    ]
