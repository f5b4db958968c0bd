"""A real vLLM behind an API key and TLS, in a data directory with a long path: the node still reaches its own engine."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from edge_node.doctor import node_status, run_checks
from edge_node.errors import ServingError
from edge_node.experience import ExperienceStore
from edge_node.main import control_socket
from edge_node.releases.evaluation import Evaluator, Sampling
from edge_node.serving import ControlClient, VllmProcess
from edge_node.settings import BaseModelSettings, EdgeSettings, EnvironmentSpec, ServingSettings
from protos.base import read_base_model
from protos.lora import LoraTensors
from tests.fakes.identity import make_identity
from tests.fakes.tiny_model import tiny_adapter, tiny_model, write_peft
from tests.fakes.word_environment import NextWord
from tests.integration.harness import free_port

pytestmark = [pytest.mark.timeout(420), pytest.mark.slow]

V0, V1 = "lorikeet@v0-00000000", "lorikeet@v1-11111111"
QUESTION = {"model": "lorikeet", "messages": [{"role": "user", "content": "w3"}], "max_tokens": 4}


@dataclass
class Guarded:
    settings: EdgeSettings
    vllm: VllmProcess
    control: ControlClient
    http: httpx.AsyncClient


@pytest.fixture
async def guarded(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guarded]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="lk-") as directory:
        data_dir = Path(directory) / "a-directory-whose-path-is-longer-than-a-unix-socket-may-have" / ("x" * 60)
        data_dir.mkdir(parents=True)
        certificate, key = make_certificate(Path(directory))
        arguments = ["--api-key", "first", "second", f"--ssl_certfile={certificate}", "--ssl-keyfile", str(key)]
        settings = EdgeSettings(
            data_dir=data_dir,
            base=BaseModelSettings(path=tiny_model()),
            serving=ServingSettings(port=free_port(), extra_args=arguments),
        )
        base = read_base_model(tiny_model())
        make_identity(data_dir, base.digest)
        vllm = VllmProcess(settings, base, control_socket(data_dir))
        running = asyncio.create_task(vllm.run())
        try:
            await vllm.wait_ready()
            trust = ssl.create_default_context(cafile=certificate)
            url = f"https://localhost:{settings.serving.port}"
            async with httpx.AsyncClient(base_url=url, verify=trust, timeout=60, trust_env=False) as http:
                yield Guarded(settings, vllm, ControlClient(control_socket(data_dir)), http)
        finally:
            await vllm.aclose()
            await running


async def test_a_guarded_endpoint_keeps_clients_out_and_not_the_node(guarded: Guarded) -> None:
    await the_node_loads_and_evaluates(guarded)
    await clients_need_a_key(guarded)
    await a_client_that_hangs_up_is_no_loss(guarded)
    await status_and_doctor_know(guarded)
    await a_hung_vllm_is_said_at_once(guarded)


async def the_node_loads_and_evaluates(guarded: Guarded) -> None:
    versions = guarded.settings.data_dir / "releases" / "versions"
    await guarded.control.load(V0, write_peft(LoraTensors(), versions / "v0"))
    await guarded.control.load(V1, write_peft(tiny_adapter(1), versions / "v1"))
    await guarded.control.point(V0)
    environments = {"words": (EnvironmentSpec(name="words", factory="x:Y"), NextWord(0, 20))}
    evaluator = Evaluator(guarded.control.requests, environments)
    result = await evaluator.compare("words", V1, V0, 0, 5, Sampling())
    outcomes = (result.both_passed, result.only_reference_passed, result.only_candidate_passed, result.neither_passed)
    assert sum(outcomes) == 5
    assert ExperienceStore(guarded.settings.data_dir / "experience.db").counts().interactions == 0


async def clients_need_a_key(guarded: Guarded) -> None:
    path = "/v1/chat/completions"
    assert (await guarded.http.post(path, json=QUESTION)).status_code == 401
    for key in ("first", "second"):
        answer = await guarded.http.post(path, json=QUESTION, headers={"authorization": f"Bearer {key}"})
        assert (answer.status_code, answer.json()["model"]) == (200, V0)
    assert (await guarded.http.get("/ready")).status_code == 200


async def a_client_that_hangs_up_is_no_loss(guarded: Guarded) -> None:
    before = await guarded.control.state()
    for stream in (False, True):
        body = QUESTION | {"max_tokens": 480, "ignore_eos": True, "stream": stream}
        headers = {"authorization": "Bearer first"}
        asking = asyncio.create_task(guarded.http.post("/v1/chat/completions", json=body, headers=headers))
        while not (await guarded.control.state()).in_flight:
            await asyncio.sleep(0)
        assert not asking.done()
        asking.cancel()  # closes its connection
        await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(30):
        while (await guarded.control.state()).in_flight:
            await asyncio.sleep(0.1)
    after = await guarded.control.state()
    assert (after.captured, after.lost, after.skipped) == (before.captured, before.lost, before.skipped)
    assert "are being lost" not in (guarded.settings.data_dir / "logs" / "vllm.log").read_text()


async def status_and_doctor_know(guarded: Guarded) -> None:
    status = await node_status(guarded.settings)
    assert (status["ready"], status["serving"]) == (True, V0)
    checks = {check.name: check for check in await run_checks(guarded.settings)}
    assert checks["endpoint"].ok, checks["endpoint"].text
    assert checks["disk"].ok, checks["disk"].text


async def a_hung_vllm_is_said_at_once(guarded: Guarded) -> None:
    pid = guarded.vllm.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(5):
            status = await node_status(guarded.settings)
        assert (status["ready"], "It hangs" in status["not_ready"]) == (False, True)
        with pytest.raises(ServingError, match="within 1 s"):
            await ControlClient(control_socket(guarded.settings.data_dir), timeout_s=1).state()
    finally:
        os.kill(pid, signal.SIGCONT)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    signed = builder.add_extension(names, critical=False).sign(key, SHA256())
    certificate, private = folder / "tls.pem", folder / "tls.key"
    certificate.write_bytes(signed.public_bytes(Encoding.PEM))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return certificate, private
