"""The real `central serve`: killed within an upload and after it, it loses nothing."""

from __future__ import annotations

import asyncio
import shutil
import signal
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from central.errors import SettingsError, StorageError
from central.file_lock import DataLock
from central.journal import Journal
from edge_node.identity import JoinToken
from protos.manifest import CHUNK_BYTES, sign
from protos.updates.v1 import updates_pb2
from tests.contract import central_harness as harness
from tests.contract.central_process import outside, process, ready
from tests.fakes.base_models import make


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_experts": 8}, "a mixture of experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
    ],
)
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
    assert (
        f"CENTRAL_BASE__PATH is not usable. Base model {path} does not work here" in errors.decode()
    )
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


async def test_a_kill_within_an_upload_costs_no_piece_that_was_written(tmp_path: Path) -> None:
    settings = harness.make_settings(tmp_path)
    payload = bytes(8 * CHUNK_BYTES)
    sent = 5 * CHUNK_BYTES
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
                await call.write(
                    updates_pb2.UploadRequest(chunk=payload[begin : min(begin + CHUNK_BYTES, sent)])
                )
            part = settings.data_dir / "uploads" / node.node_id / f"{manifest.digest}.part"
            while not part.exists() or part.stat().st_size < sent:
                await asyncio.sleep(0.01)
            first.kill()
            await first.wait()
            with pytest.raises(grpc.aio.AioRpcError):
                await call
            async with process(settings, "serve") as second:
                await ready(second)
                await node.channel.channel_ready()
                assert (await node.query(manifest.digest)).committed_bytes == sent


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
                _, writer = await asyncio.open_connection(
                    "127.0.0.1", ports[number // 2 % 2], ssl=tls
                )
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
        f"central: Central cannot listen on 127.0.0.1:{settings.listen.enrollment_port}: "
        "Address already in use. Stop the program that has the port, or set "
        "CENTRAL_LISTEN__ENROLLMENT_PORT or CENTRAL_LISTEN__HOST."
    ]
