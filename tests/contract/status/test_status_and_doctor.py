"""`edge-node status` and `doctor` beside a node that runs, hangs, or cannot: right, and at once."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edge_node.access import Keyring, Scope, create_key, keys_file
from edge_node.base_model import read_base
from edge_node.doctor import node_status, run_check
from edge_node.errors import SettingsError
from edge_node.experience import ExperienceStore, Feedback, Interaction
from edge_node.heartbeat import FILE_NAME
from edge_node.outbox import Outbox
from edge_node.problems import Problems
from edge_node.serving import control_socket
from edge_node.serving.client import short_path
from edge_node.serving_settings import TlsSettings
from edge_node.settings import EdgeSettings, EnvironmentSpec, ServingSettings
from edge_node.sizing import expect_trainable
from examples.ports import free_port
from tests.fakes.node_data import make_node

ROOT = Path(__file__).resolve().parents[3]
V1 = "lorikeet@v1-aaaaaaaa"


def with_serving(settings: EdgeSettings, **serving: Any) -> EdgeSettings:
    return settings.model_copy(update={"serving": ServingSettings(**serving)})


async def endpoint(settings: EdgeSettings) -> tuple[bool, str]:
    check = await run_check("endpoint", settings)
    return check.ok, check.text


@pytest.mark.parametrize("directory", ["another-tmp", "x" * 120])
async def test_status_finds_the_node_from_another_temporary_directory(
    running: EdgeSettings, tmp_path: Path, directory: str
) -> None:
    """systemd's PrivateTmp gives a service a /tmp of its own."""
    (tmp_path / directory).mkdir()
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("EDGE_")
    } | {
        "TMPDIR": str(tmp_path / directory),
        "EDGE_DATA_DIR": str(running.data_dir),
        "EDGE_BASE__PATH": str(running.base.path),
        "EDGE_SERVING__PORT": str(running.serving.port),
        "PYTHONPATH": str(ROOT),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edge_node.cli", "status", "--json",
        cwd=tmp_path, env=environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors.decode()
    status = json.loads(output)
    assert (status["ready"], status["serving"]) == (True, V1)


async def test_doctor_knows_a_node_that_serves(running: EdgeSettings) -> None:
    assert await endpoint(running) == (True, f"serving on 127.0.0.1:{running.serving.port}")
    ok, text = await endpoint(with_serving(running, port=free_port()))
    assert (ok, "was started with" in text) == (False, True)


@pytest.mark.parametrize(
    ("learning", "ok", "words"),
    [
        ({}, True, "parameters in float32 on cpu, 14 modules with"),
        ({"enabled": False}, True, "off: the node serves"),
        ({"device": "cuda"}, False, "torch sees no CUDA device here"),
        ({"target_modules": ["x_proj"]}, False, "EDGE_LEARNING__TARGET_MODULES names 'x_proj'"),
    ],
)
async def test_doctor_estimates_a_round_or_says_why_none_could_start(
    tmp_path: Path, learning: dict[str, Any], ok: bool, words: str
) -> None:
    check = await run_check("learning", make_node(tmp_path / "node", **learning))
    assert (check.ok, words in check.text) == (ok, True), check.text


async def test_doctor_says_what_tensorboard_files_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_node.learning.reports.WRITERS", ("no_such_package",))
    settings = make_node(tmp_path / "node", tensorboard=True)
    check = await run_check("learning", settings)
    assert (check.ok, "Run `pip install no_such_package`" in check.text) == (False, True)
    with pytest.raises(SettingsError, match="EDGE_LEARNING__TENSORBOARD is true"):
        expect_trainable(settings, read_base(settings))


@pytest.mark.parametrize("host", ["::1", "::", "0.0.0.0", "127.0.0.1", "localhost"])
async def test_doctor_tries_the_address_that_vllm_will_use(
    settings: EdgeSettings, host: str
) -> None:
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
    ("file", "expected"), [("/nowhere/x", "No such file"), ("/dev/null", "PEM")]
)
async def test_tls_files_are_tried_before_vllm_is_started(
    settings: EdgeSettings, file: str, expected: str
) -> None:
    tls = TlsSettings(cert_file=Path(file), key_file=Path(file))
    ok, text = await endpoint(with_serving(settings, port=free_port(), tls=tls))
    assert (ok, expected in text) == (False, True), text


async def test_a_key_of_vllm_is_refused_before_vllm_is_started(
    settings: EdgeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = with_serving(settings, port=free_port())
    monkeypatch.setenv("VLLM_API_KEY", "sk-secret")
    ok, text = await endpoint(serving)
    assert (ok, "VLLM_API_KEY is set" in text, "edge-node keys create" in text) == (
        False,
        True,
        True,
    )
    assert "sk-secret" not in text


async def test_doctor_and_status_say_that_no_client_has_a_key(settings: EdgeSettings) -> None:
    serving = with_serving(settings, host="0.0.0.0", port=free_port())
    check = await run_check("access", serving)
    assert (check.ok, "every request gets 401" in check.text) == (False, True)
    Keyring(serving, Problems(settings.data_dir))
    problems = {p["room"]: p for p in (await node_status(serving))["problems"]}
    assert "edge-node keys create NAME" in problems["access"]["next_step"]
    create_key(keys_file(serving), "app", [Scope.INFER], None)
    check = await run_check("access", serving)
    assert (check.ok, "1 of 1" in check.text) == (True, True)


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


async def test_an_engine_that_hangs_is_not_ready(
    running: EdgeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
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


async def test_a_store_that_cannot_be_opened_or_is_locked_does_not_hide_the_rest(
    running: EdgeSettings,
) -> None:
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
    assert [problem["room"] for problem in status["problems"] if problem["room"] == "outbox"] == [
        "outbox"
    ]


async def test_status_says_why_answers_cannot_be_learnt_from(settings: EdgeSettings) -> None:
    reason = "the prompt holds more than text"
    store = ExperienceStore(settings.data_dir / "experience.db")
    served = Interaction(
        "c-1",
        "2026-11-22T00:00:00Z",
        V1,
        [],
        "a",
        "stop",
        "/v1/completions",
        (),
        (),
        unusable=reason,
    )
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
    check = await run_check("experience", settings)
    holder.close()
    assert time.monotonic() - started < 3
    assert check.ok is (file != "experience.db")
    (problem,) = [each for each in status["problems"] if each["room"] in ("experience", "outbox")]
    assert "locked" in problem["text"]


@pytest.mark.parametrize(
    ("anchors", "expected"),
    [
        ((False, True), "words, text (texts, anchor); no anchor of tasks"),
        ((True, False), "words (anchor), text (texts)"),
    ],
)
async def test_doctor_tells_environments_of_texts_from_those_of_tasks(
    settings: EdgeSettings, anchors: tuple[bool, bool], expected: str
) -> None:
    factories = ("word_environment:NextWord", "text_environment:Texts")
    specs = [
        EnvironmentSpec(name=name, factory=f"tests.fakes.{factory}", anchor=anchor)
        for name, factory, anchor in zip(("words", "text"), factories, anchors, strict=True)
    ]
    with_both = settings.model_copy(update={"environments": specs})
    check = await run_check("environments", with_both)
    assert check.ok
    assert check.text.startswith(expected)
    assert ("rounds will not protect" in check.text) == (not anchors[0])
