"""A real vLLM behind access keys and TLS, at a long path: only who has a key is answered."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from openai import (
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    PermissionDeniedError,
    RateLimitError,
)

from edge_node.access import Scope, create_key, keys_file, revoke_key
from edge_node.doctor import node_status, run_checks
from edge_node.errors import ServingError
from edge_node.experience import open_experience
from edge_node.experience_settings import ExperienceSettings
from edge_node.releases.evaluation import Evaluator, Sampling
from edge_node.serving import ControlClient, VllmProcess, control_socket
from edge_node.serving_settings import LimitsSettings, TlsSettings
from edge_node.settings import BaseModelSettings, EdgeSettings, EnvironmentSpec, ServingSettings
from examples.ports import free_port
from protos.base import read_base_model
from protos.lora import LoraTensors
from tests.fakes.certificates import make_certificate
from tests.fakes.identity import make_identity
from tests.fakes.tiny_model import tiny_adapter, tiny_model, write_peft
from tests.fakes.word_environment import NextWord

pytestmark = [pytest.mark.timeout(420), pytest.mark.slow]

V0, V1 = "lorikeet@v0-00000000", "lorikeet@v1-11111111"
QUESTION: dict[str, Any] = {
    "model": "lorikeet",
    "messages": [{"role": "user", "content": "w3"}],
    "max_tokens": 4,
}


@dataclass
class Guarded:
    settings: EdgeSettings
    vllm: VllmProcess
    control: ControlClient
    http: httpx.AsyncClient
    key: str = ""

    def client(self, key: str) -> AsyncOpenAI:
        url = f"https://localhost:{self.settings.serving.port}/v1"
        return AsyncOpenAI(base_url=url, api_key=key, max_retries=0, http_client=self.http)


@pytest.fixture
async def guarded(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guarded]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="lk-") as directory:
        data_dir = (
            Path(directory)
            / "a-directory-whose-path-is-longer-than-a-unix-socket-may-have"
            / ("x" * 60)
        )
        data_dir.mkdir(parents=True)
        certificate, key = make_certificate(Path(directory))
        sealing = Path(directory) / "experience.key"
        sealing.write_text("ab" * 32)
        settings = EdgeSettings(
            data_dir=data_dir,
            base=BaseModelSettings(path=tiny_model()),
            experience=ExperienceSettings(key_file=sealing),
            serving=ServingSettings(
                port=free_port(),
                tls=TlsSettings(cert_file=certificate, key_file=key),
                access="required",
                limits=LimitsSettings(choices=4, concurrent_requests=2),
            ),
        )
        base = read_base_model(tiny_model())
        make_identity(data_dir, base.digest)
        vllm = VllmProcess(settings, base, control_socket(data_dir))
        running = asyncio.create_task(vllm.run())
        try:
            await vllm.wait_ready()
            trust = ssl.create_default_context(cafile=certificate)
            url = f"https://localhost:{settings.serving.port}"
            async with httpx.AsyncClient(
                base_url=url, verify=trust, timeout=60, trust_env=False
            ) as http:
                control = ControlClient(control_socket(data_dir))
                yield Guarded(settings, vllm, control, http)
        finally:
            await vllm.aclose()
            await running


async def test_a_guarded_endpoint_keeps_clients_out_and_not_the_node(guarded: Guarded) -> None:
    await the_node_loads_and_evaluates(guarded)
    await nobody_is_let_in_before_there_is_a_key(guarded)
    await clients_need_a_key(guarded)
    await a_key_does_what_its_scopes_say(guarded)
    await a_revoked_key_is_refused_within_two_seconds(guarded)
    await a_request_that_asks_too_much_starves_nobody(guarded)
    await a_client_that_hangs_up_is_no_loss(guarded)
    await a_renewed_certificate_is_served(guarded)
    await status_and_doctor_know(guarded)
    await a_hung_vllm_is_said_at_once(guarded)


async def the_node_loads_and_evaluates(guarded: Guarded) -> None:
    versions = guarded.settings.data_dir / "releases" / "versions"
    await guarded.control.load(V0, write_peft(LoraTensors(), versions / "v0"))
    await guarded.control.load(V1, write_peft(tiny_adapter(1), versions / "v1"))
    await guarded.control.point(V0)
    environments = {
        "words": (EnvironmentSpec(name="words", factory="x:Y"), lambda: NextWord(0, 20))
    }
    evaluator = Evaluator(guarded.control.requests, environments)
    result = await evaluator.compare("words", V1, V0, 0, 5, Sampling())
    outcomes = (
        result.both_passed,
        result.only_reference_passed,
        result.only_candidate_passed,
        result.neither_passed,
    )
    assert sum(outcomes) == 5
    assert open_experience(guarded.settings).counts().interactions == 0


async def nobody_is_let_in_before_there_is_a_key(guarded: Guarded) -> None:
    with pytest.raises(AuthenticationError):
        await ask(guarded, "none")
    status = await node_status(guarded.settings)
    problems = {problem["room"]: problem for problem in status["problems"]}
    assert status["ready"], "it serves, and waits for a key"
    assert "edge-node keys create NAME" in problems["access"]["next_step"]
    path = keys_file(guarded.settings)
    guarded.key = create_key(path, "app", [Scope.INFER, Scope.FEEDBACK], "alice")


async def clients_need_a_key(guarded: Guarded) -> None:
    await within_2_s(lambda: answers(guarded, guarded.key))
    for key in ("lk-wrong", "none"):
        with pytest.raises(AuthenticationError) as caught:
            await ask(guarded, key)
        assert "is not valid" in caught.value.message
    other = await guarded.http.post(
        "/v1/chat/completions", json=QUESTION, headers={"x-api-key": guarded.key}
    )
    assert (other.status_code, other.json()["model"]) == (200, V0)
    nobody = await guarded.http.post("/v1/chat/completions", json=QUESTION)
    assert (nobody.status_code, nobody.headers["www-authenticate"]) == (
        401,
        'Bearer realm="lorikeet"',
    )
    for path in ("/ready", "/health"):
        assert (await guarded.http.get(path)).status_code == 200
    for path in ("/metrics", "/version", "/v1/models", "/docs", "/openapi.json"):
        assert (await guarded.http.get(path)).status_code == 401, path


async def a_key_does_what_its_scopes_say(guarded: Guarded) -> None:
    raw = await guarded.client(guarded.key).chat.completions.with_raw_response.create(
        **QUESTION, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    answer = raw.parse()
    assert answer.model == V0
    models = await guarded.client(guarded.key).models.list()
    assert "lorikeet" in {model.id for model in models.data}
    path = keys_file(guarded.settings)
    bob = create_key(path, "bob", [Scope.FEEDBACK], "bob")
    metrics = create_key(path, "metrics", [Scope.ADMIN], None)
    await within_2_s(lambda: answers(guarded, metrics, "/metrics"))
    with pytest.raises(PermissionDeniedError, match="needs infer"):
        await ask(guarded, bob)
    judged = {"id": answer.id, "score": 1}
    statuses = [
        (
            await guarded.http.post(
                "/v1/feedback", json=judged, headers={"authorization": f"Bearer {key}"}
            )
        ).status_code
        for key in (metrics, bob, guarded.key)
    ]
    assert statuses == [403, 404, 200], "bob did not ask"
    kept = open_experience(guarded.settings).interaction(answer.id)
    assert kept is not None
    assert kept.answer == answer.choices[0].message.content
    written = b"".join(
        file.read_bytes() for file in guarded.settings.data_dir.glob("experience.db*")
    )
    assert b'"role"' not in written, "vLLM's process seals what it keeps"
    assert answer.id.encode() in written


async def a_revoked_key_is_refused_within_two_seconds(guarded: Guarded) -> None:
    path = keys_file(guarded.settings)
    key = create_key(path, "short", [Scope.INFER], None)
    await within_2_s(lambda: answers(guarded, key))
    revoke_key(path, "short")

    async def refused() -> bool:
        return not await answers(guarded, key)

    await within_2_s(refused)
    good = path.read_bytes()
    path.write_bytes(b"{")
    await asyncio.sleep(2)
    assert (await answers(guarded, guarded.key), await answers(guarded, key)) == (True, False)
    assert not await has_access(guarded)
    path.write_bytes(good)
    await within_2_s(lambda: has_access(guarded))


async def a_request_that_asks_too_much_starves_nobody(guarded: Guarded) -> None:
    started = time.monotonic()
    with pytest.raises(BadRequestError, match="n is 10000; this node takes at most 4"):
        await guarded.client(guarded.key).chat.completions.create(**QUESTION, n=10_000)
    assert time.monotonic() - started < 2
    long = QUESTION | {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
    client = guarded.client(guarded.key)
    streams = [await client.chat.completions.create(**long, stream=True) for _ in range(2)]
    with pytest.raises(RateLimitError, match="2 requests of this key are in flight") as caught:
        await ask(guarded, guarded.key)
    assert caught.value.response.headers["retry-after"] == "1"
    for stream in streams:
        async for _ in stream:
            pass
    await within_2_s(lambda: answers(guarded, guarded.key))


async def ask(guarded: Guarded, key: str) -> str:
    answer = await guarded.client(key).chat.completions.create(**QUESTION)
    return str(answer.model)


async def answers(guarded: Guarded, key: str, path: str = "/v1/models") -> bool:
    response = await guarded.http.get(path, headers={"authorization": f"Bearer {key}"})
    assert response.status_code in (200, 401, 429)
    return response.status_code == 200


async def has_access(guarded: Guarded) -> bool:
    problems = (await node_status(guarded.settings))["problems"]
    return "access" not in {problem["room"] for problem in problems}


async def within_2_s(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(2):
        while not await holds():
            await asyncio.sleep(0.05)


async def a_client_that_hangs_up_is_no_loss(guarded: Guarded) -> None:
    before = await guarded.control.state()
    for stream in (False, True):
        body = QUESTION | {"max_tokens": 480, "ignore_eos": True, "stream": stream}
        headers = {"authorization": f"Bearer {guarded.key}"}
        asking = asyncio.create_task(
            guarded.http.post("/v1/chat/completions", json=body, headers=headers)
        )
        while not (await guarded.control.state()).in_flight:
            await asyncio.sleep(0)
        assert not asking.done()
        asking.cancel()  # closes its connection
        await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(30):
        while (await guarded.control.state()).in_flight:
            await asyncio.sleep(0.1)
    after = await guarded.control.state()
    assert (after.lost, after.skipped) == (before.lost, before.skipped)
    assert after.captured - before.captured in (0, 1), "a stream is kept as far as it came"
    assert "are being lost" not in (guarded.settings.data_dir / "logs" / "vllm.log").read_text()


async def a_renewed_certificate_is_served(guarded: Guarded) -> None:
    certificate = guarded.settings.serving.tls.cert_file
    assert certificate is not None
    port = guarded.settings.serving.port
    pid = guarded.vllm.pid
    for serial in (2, 3):
        make_certificate(certificate.parent, serial)
        async with asyncio.timeout(15):
            while await asyncio.to_thread(shown_serial, port) != serial:
                await asyncio.sleep(0.2)
    assert guarded.vllm.pid == pid, "nothing was restarted"
    trust = ssl.create_default_context(cafile=certificate)
    async with httpx.AsyncClient(verify=trust, trust_env=False) as http:
        answer = await http.get(f"https://localhost:{port}/ready")
        assert answer.status_code == 200


def shown_serial(port: int) -> int:
    """Serial number of the certificate that a new connection is shown."""
    pem = ssl.get_server_certificate(("127.0.0.1", port))
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


async def status_and_doctor_know(guarded: Guarded) -> None:
    status = await node_status(guarded.settings)
    assert (status["ready"], status["serving"]) == (True, V0)
    checks = {check.name: check for check in await run_checks(guarded.settings)}
    assert checks["endpoint"].ok, checks["endpoint"].text
    assert "a key is required; 3 of 4" in checks["access"].text
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
