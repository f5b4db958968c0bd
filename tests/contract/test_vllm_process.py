"""VllmProcess and its problem, with a stand-in for vLLM that serves, ends and hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_node.errors import ServingError
from edge_node.problems import Problem, Problems
from edge_node.serving import VllmProcess
from edge_node.serving.doorway import Doorway
from edge_node.serving_settings import TlsSettings
from edge_node.settings import EdgeSettings
from examples.ports import free_port
from protos.base import BaseModelInfo
from tests.fakes.certificates import make_certificate

STAND_IN = """
import os, sys
from aiohttp import web
import signal
signal.signal(signal.SIGUSR1, lambda *_: os._exit(1))
mode = open(sys.argv[1]).read()
if mode not in ("good", "hangs"):
    print("(APIServer pid=7) WARNING 11-26 19:12:43 [x.py:1] Found ulimit of 9: "
          "errors like `OSError: [Errno 24] Too many`")
    exec(mode)
async def state(request):
    return web.json_response(dict(
        alias="a", base="b", target=None, loaded={}, in_flight={}, captured=0, lost=0, skipped=0,
        draining=False, not_ready=None, problems=[]))
async def probe(request):
    return web.json_response(dict(alive=mode != "hangs"))
async def health(request):
    return web.Response()
async def main():
    import asyncio
    app = web.Application()
    app.add_routes([web.get("/state", state), web.get("/health", health)])
    app.add_routes([web.post("/probe", probe), web.post("/drain", probe)])
    runner = web.AppRunner(app)
    await runner.setup()
    import socket
    inherited = socket.socket(fileno=int(os.environ["LORIKEET_LISTEN_FD"]))
    await web.SockSite(runner, inherited).start()
    await web.UnixSite(runner, os.environ["LORIKEET_CONTROL_SOCKET"]).start()
    await asyncio.Event().wait()
import asyncio
asyncio.run(main())
"""
TRACEBACK = 'Traceback (most recent call last):\n  File "x/engine.py", line 7, in step\n'


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EdgeSettings:
    settings = EdgeSettings.model_validate(
        {
            "data_dir": tmp_path,
            "base": {"path": tmp_path},
            "serving": {"port": free_port(), "startup_timeout_s": 20},
        }
    )
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "mode").write_text("good")
    command = [
        sys.executable,
        str(tmp_path / "stand_in.py"),
        str(tmp_path / "mode"),
    ]
    monkeypatch.setattr("edge_node.serving.process.serving_command", lambda *_, **__: command)
    monkeypatch.setattr("edge_node.serving.process.calm_s", lambda ran_s: 0.3)
    return settings


@asynccontextmanager
async def running(
    settings: EdgeSettings, **options: Any
) -> AsyncIterator[tuple[VllmProcess, asyncio.Task[None]]]:
    with (
        tempfile.TemporaryDirectory() as directory
    ):  # short: tmp_path may be longer than a socket path
        base = BaseModelInfo(settings.data_dir, "ab" * 32, {})
        vllm = VllmProcess(settings, base, Path(directory) / "s", probe_period_s=0.05, **options)
        task = asyncio.create_task(vllm.run())
        try:
            yield vllm, task
        finally:
            await vllm.aclose()
            await asyncio.gather(task, return_exceptions=True)


def trouble(settings: EdgeSettings) -> Problem | None:
    return next(
        (problem for problem in Problems(settings.data_dir).current() if problem.room == "serving"),
        None,
    )


async def until(seen: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not seen():
            await asyncio.sleep(0.02)


async def test_a_vllm_that_is_killed_is_a_problem_until_another_one_has_served_for_a_while(
    settings: EdgeSettings,
) -> None:
    async with running(settings) as (vllm, _):
        await vllm.wait_ready()
        assert trouble(settings) is None
        said = f"{TRACEBACK}ValueError: an hour ago\n"
        (settings.data_dir / "logs" / "vllm.log").write_text(said)
        assert vllm.pid is not None
        os.kill(vllm.pid, signal.SIGKILL)
        await until(lambda: trouble(settings) is not None)
        problem = trouble(settings)
        assert problem is not None
        assert problem.text == "vLLM ended and is started again: killed by SIGKILL."
        assert "memory" in problem.next_step
        await until(lambda: trouble(settings) is None)
        assert vllm.generation == 2


async def test_what_a_vllm_that_served_died_of_quotes_nobody(settings: EdgeSettings) -> None:
    async with running(settings) as (vllm, _):
        await vllm.wait_ready()
        log = settings.data_dir / "logs" / "vllm.log"
        said = f"{TRACEBACK}ValueError: bad prompt: secret\n"
        log.write_text(said)
        assert vllm.pid is not None
        os.kill(vllm.pid, signal.SIGUSR1)
        await until(lambda: trouble(settings) is not None)
        problem = trouble(settings)
        assert problem is not None
        assert "Its log says: ValueError (engine.py:7)." in problem.text
        assert "secret" not in problem.text


async def test_a_vllm_that_does_not_start_says_why_and_a_later_node_that_does_is_well(
    settings: EdgeSettings,
) -> None:
    mode = settings.data_dir / "mode"
    mode.write_text("raise MemoryError('no room for the cache')")
    async with running(settings) as (_, task):
        with pytest.raises(
            ServingError,
            match=r"exited with code 1. Its log says: MemoryError: no room for the cache",
        ):
            await task
    problem = trouble(settings)
    assert problem is not None
    assert "no room for the cache" in problem.text
    assert "ulimit" not in problem.text
    assert "edge-node serve" in problem.next_step
    mode.write_text("good")
    async with running(settings):
        await until(lambda: trouble(settings) is None)


async def test_who_waits_for_a_vllm_that_does_not_start_ends_after_it(
    settings: EdgeSettings,
) -> None:
    """The node tells the error of the task that ended first; a follower's is a traceback."""
    (settings.data_dir / "mode").write_text("sys.exit(3)")
    async with running(settings) as (vllm, task):
        follower = asyncio.create_task(vllm.wait_ready())
        done, _ = await asyncio.wait([follower, task], return_when=asyncio.FIRST_COMPLETED)
        assert task in done
        for ended in (task, follower):
            with pytest.raises(ServingError, match="did not start"):
                await ended


async def test_a_later_start_that_fails_is_told_with_its_words(settings: EdgeSettings) -> None:
    """This one has not served, so it quotes no request."""
    async with running(settings) as (vllm, _):
        await vllm.wait_ready()
        (settings.data_dir / "mode").write_text("raise OSError('the base is gone')")
        assert vllm.pid is not None
        os.kill(vllm.pid, signal.SIGKILL)
        await until(lambda: "the base is gone" in getattr(trouble(settings), "text", ""))


async def test_while_no_vllm_serves_the_port_answers_503_and_refuses_nobody(
    settings: EdgeSettings,
) -> None:
    answers: list[httpx.Response] = []
    url = f"http://127.0.0.1:{settings.serving.port}"

    async def ask(http: httpx.AsyncClient) -> None:
        while True:  # a refused connection raises
            body = {"messages": [], "max_tokens": 1 << 16, "x": "y" * (1 << 17)}
            answers.append(await http.post(f"{url}/v1/chat/completions", json=body))
            answers.append(await http.get(f"{url}/ready"))
            await asyncio.sleep(0.01)

    async with running(settings) as (vllm, _), httpx.AsyncClient() as http:
        asking = asyncio.create_task(ask(http))
        await vllm.wait_ready()
        assert (await http.get(f"{url}/health")).status_code == 200, "vLLM alone answers"
        assert answers[0].status_code == 503, "also at the first start"
        asking.cancel()  # what is in flight on a killed vLLM breaks
        await asyncio.gather(asking, return_exceptions=True)
        answers.clear()
        assert vllm.pid is not None
        os.kill(vllm.pid, signal.SIGKILL)
        await until(lambda: trouble(settings) is not None)
        asking = asyncio.create_task(ask(http))
        await until(lambda: vllm.generation == 2 and len(answers) > 4)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await vllm.wait_ready()
        assert (await http.get(f"{url}/health")).status_code == 200
    early = [answer for answer in answers if answer.status_code == 503]
    assert len(early) > 2
    for answer in early:
        assert answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["type"] == "ServiceUnavailableError"
    with pytest.raises(httpx.ConnectError):
        async with httpx.AsyncClient() as http:
            await http.get(f"{url}/ready")


async def test_the_503_comes_by_tls_where_vllm_has_it(
    settings: EdgeSettings, tmp_path: Path
) -> None:
    certificate, key = make_certificate(tmp_path)
    tls = TlsSettings(cert_file=certificate, key_file=key)
    serving = settings.serving.model_copy(update={"tls": tls})
    doorway = Doorway(serving)
    doorway.open()
    trust = ssl.create_default_context(cafile=str(certificate))
    try:
        for _ in range(2):
            await doorway.answer()
            async with httpx.AsyncClient(verify=trust, trust_env=False) as http:
                answer = await http.get(f"https://localhost:{serving.port}/v1/models")
            assert answer.status_code == 503
            await doorway.leave()
    finally:
        await doorway.aclose()


async def test_a_vllm_that_makes_no_token_is_started_again(settings: EdgeSettings) -> None:
    mode = settings.data_dir / "mode"
    mode.write_text("hangs")
    async with running(settings) as (vllm, _):
        await vllm.wait_ready()
        mode.write_text("good")
        await until(lambda: trouble(settings) is not None)
        problem = trouble(settings)
        assert problem is not None
        assert "hung: 2 probes of 60 s without a token" in problem.text
        await until(lambda: trouble(settings) is None)
        assert vllm.generation == 2


async def test_each_end_is_told_and_a_first_start_is_tried_again_where_that_may_help(
    settings: EdgeSettings,
) -> None:
    mode = settings.data_dir / "mode"
    mode.write_text("raise OSError('the adapter is bad')")
    told: list[tuple[str, bool]] = []

    def ended(cause: str, *, served: bool) -> bool:
        told.append((cause, served))
        mode.write_text("good")
        return True

    async with running(settings, ended=ended) as (vllm, _):
        await vllm.wait_ready()
        assert told == [("it exited with code 1", False)]
        assert vllm.pid is not None
        os.kill(vllm.pid, signal.SIGKILL)
        await until(lambda: len(told) == 2)
        assert told[1] == ("killed by SIGKILL", True)
    assert len(told) == 2, "an end that was ordered is none"
