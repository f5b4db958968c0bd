"""`edge-node status` and `doctor` beside a node that runs, hangs, or cannot: right, and at once."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from edge_node.doctor import node_status, run_checks
from edge_node.experience import ExperienceStore, Feedback, Interaction
from edge_node.heartbeat import FILE_NAME
from edge_node.main import control_socket
from edge_node.outbox import Outbox
from edge_node.serving.client import short_path
from edge_node.serving.control import ControlServer
from edge_node.settings import BaseModelSettings, EdgeSettings, ServingSettings
from protos.base import read_base_model
from tests.contract.central_harness import make_base
from tests.fakes.endpoint import Outside
from tests.fakes.gateway import make_gateway, make_version
from tests.fakes.identity import make_identity
from tests.integration.harness import free_port

ROOT = Path(__file__).resolve().parents[2]
V1 = "lorikeet@v1-aaaaaaaa"


def with_serving(settings: EdgeSettings, **serving: Any) -> EdgeSettings:
    return settings.model_copy(update={"serving": ServingSettings(**serving)})


@pytest.fixture
def settings(tmp_path: Path) -> EdgeSettings:
    base = make_base(tmp_path / "base")
    make_identity(tmp_path / "node", read_base_model(base).digest)
    return EdgeSettings(
        data_dir=tmp_path / "node", base=BaseModelSettings(path=base), serving=ServingSettings(port=free_port())
    )


@pytest.fixture
async def running(settings: EdgeSettings, tmp_path: Path) -> AsyncIterator[EdgeSettings]:
    """A node that serves V1, as far as control socket and port show it."""
    gateway = make_gateway(tmp_path / "vllm")
    await gateway.load(V1, make_version(tmp_path, "v1"))
    gateway.point(V1)
    server = ControlServer(gateway, control_socket(settings.data_dir), Outside(None))
    await server.start()
    with socket.create_server(("127.0.0.1", settings.serving.port)):
        yield settings
    await server.aclose()


async def endpoint(settings: EdgeSettings) -> tuple[bool, str]:
    (check,) = [check for check in await run_checks(settings) if check.name == "endpoint"]
    return check.ok, check.text


@pytest.mark.parametrize("directory", ["another-tmp", "x" * 120])
async def test_status_finds_the_node_from_another_temporary_directory(
    running: EdgeSettings, tmp_path: Path, directory: str
) -> None:
    """systemd's PrivateTmp gives a service a /tmp of its own."""
    (tmp_path / directory).mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("EDGE_")} | {
        "TMPDIR": str(tmp_path / directory),
        "EDGE_DATA_DIR": str(running.data_dir),
        "EDGE_BASE__PATH": str(running.base.path),
        "EDGE_SERVING__PORT": str(running.serving.port),
        "PYTHONPATH": str(ROOT),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edge_node.cli", "status", "--json",
        cwd=tmp_path, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors.decode()
    status = json.loads(output)
    assert (status["ready"], status["serving"]) == (True, V1)


async def test_doctor_knows_a_node_that_serves(running: EdgeSettings) -> None:
    assert await endpoint(running) == (True, f"serving on 127.0.0.1:{running.serving.port}")
    ok, text = await endpoint(with_serving(running, port=free_port()))
    assert (ok, "was started with" in text) == (False, True)


@pytest.mark.parametrize("host", ["::1", "::", "0.0.0.0", "127.0.0.1", "localhost"])
async def test_doctor_tries_the_address_that_vllm_will_use(settings: EdgeSettings, host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        taken = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with taken:
        port = taken.getsockname()[1]
        ok, text = await endpoint(with_serving(settings, host=host, port=port))
        assert (ok, f"Port {port} on {host} is taken" in text) == (False, True)
        (settings.data_dir / FILE_NAME).touch()
        ok, text = await endpoint(with_serving(settings, host=host, port=port))
        assert (ok, "The node runs but does not serve" in text) == (False, True)
    assert await endpoint(with_serving(settings, host=host, port=port)) == (
        True,
        f"{host}:{port} is free; run `edge-node serve`",
    )


async def test_doctor_names_an_address_of_another_machine(settings: EdgeSettings) -> None:
    ok, text = await endpoint(with_serving(settings, host="192.0.2.1"))
    assert (ok, "EDGE_SERVING__HOST" in text) == (False, True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ssl-keyfile", "/x"], "without --ssl-certfile"),
        (["--ssl-certfile", "/x"], "No such file"),
        (["--ssl_certfile=/dev/null", "--ssl-keyfile=/dev/null"], "PEM"),
    ],
)
async def test_tls_files_are_tried_before_vllm_is_started(
    settings: EdgeSettings, arguments: list[str], expected: str
) -> None:
    ok, text = await endpoint(with_serving(settings, port=free_port(), extra_args=arguments))
    assert (ok, expected in text) == (False, True), text


async def test_a_temporary_directory_that_is_too_long_for_vllm_is_named(
    settings: EdgeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = with_serving(settings, port=free_port())
    for size, expected in ((70, True), (71, False)):
        monkeypatch.setattr("tempfile.tempdir", "/" + "x" * (size - 1))
        ok, text = await endpoint(serving)
        assert (ok, "Set TMPDIR" in text) == (expected, not expected)
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/tmp")
    assert (await endpoint(serving))[0]


async def test_an_engine_that_hangs_is_not_ready(running: EdgeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_node.serving.gateway.Gateway.silent_s", lambda gateway: 34.0)
    status = await node_status(running)
    assert (status["ready"], "no token for 34 s" in status["not_ready"]) == (False, True)
    assert (await endpoint(running))[0] is False


async def test_status_answers_when_vllm_does_not(settings: EdgeSettings) -> None:
    with socket.socket(socket.AF_UNIX) as hanging:
        with short_path(control_socket(settings.data_dir)) as path:
            hanging.bind(path)
        hanging.listen()
        started = time.monotonic()
        status = await node_status(settings)
    assert (status["ready"], "It hangs" in status["not_ready"]) == (False, True)
    assert time.monotonic() - started < 8


async def test_a_store_that_cannot_be_opened_or_is_locked_does_not_hide_the_rest(running: EdgeSettings) -> None:
    ExperienceStore(running.data_dir / "experience.db").close()
    (running.data_dir / "outbox" / "outbox.db").mkdir(parents=True)
    writer = sqlite3.connect(running.data_dir / "experience.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    status = await node_status(running)
    writer.close()
    assert time.monotonic() - started < 8
    assert (status["ready"], status["interactions"], status["outbox"]) == (True, 0, None)
    assert status["unusable_examples"] == {}
    assert [problem["room"] for problem in status["problems"] if problem["room"] == "outbox"] == ["outbox"]


async def test_status_says_why_answers_cannot_be_learnt_from(settings: EdgeSettings) -> None:
    reason = "the prompt holds more than text"
    store = ExperienceStore(settings.data_dir / "experience.db")
    served = Interaction("c-1", "2026-11-22T00:00:00Z", V1, [], "a", "stop", "/v1/completions", (), (), unusable=reason)
    store.add_interactions([served])
    assert store.add_feedback(Feedback("c-1", score=1.0), max_tokens=9).unusable == reason
    store.close()
    status = await node_status(settings)
    assert (status["examples"], status["unusable_examples"]) == (0, {reason: 1})
    (settings.data_dir / "experience.db").write_bytes(b"no database" * 100)
    assert (await node_status(settings))["unusable_examples"] is None


@pytest.mark.parametrize("file", ["experience.db", "outbox/outbox.db"])
async def test_status_does_not_wait_for_a_store_that_another_process_keeps_to_itself(
    settings: EdgeSettings, file: str
) -> None:
    ExperienceStore(settings.data_dir / "experience.db").close()
    Outbox(settings.data_dir / "outbox", "auto")
    holder = sqlite3.connect(settings.data_dir / file, isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    status = await node_status(settings)
    holder.close()
    assert time.monotonic() - started < 2
    (problem,) = [each for each in status["problems"] if each["room"] in ("experience", "outbox")]
    assert "locked" in problem["text"]
