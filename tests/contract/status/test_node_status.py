"""`edge-node status` and the supervisor's problems: what is shown, and what is dropped."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request

from edge_node.doctor import node_status
from edge_node.errors import EnrollmentError, SettingsError, StorageError
from edge_node.experience import Interaction, Receipt
from edge_node.main import own_data_dir, serve
from edge_node.problems import Problems
from edge_node.serving import control_socket
from edge_node.serving import gateway as gateways
from edge_node.serving.control import ControlServer
from edge_node.serving.feedback_routes import FeedbackRoutes
from edge_node.serving.gateway import Gateway
from edge_node.serving.session_port import SessionPort
from edge_node.settings import EdgeSettings
from tests.fakes.endpoint import Outside
from tests.fakes.gateway import make_gateway, make_version
from tests.fakes.node_data import make_node
from tests.fakes.tiny_model import tiny_model

V1 = "lorikeet@v1-aaaaaaaa"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EdgeSettings:
    monkeypatch.setattr("edge_node.certificate.NEAR_END", timedelta(0))
    free(monkeypatch, 1 << 40)
    return make_node(tmp_path / "node")


@pytest.fixture
async def gateway(
    settings: EdgeSettings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Gateway]:
    """What runs in vLLM's process, with its control socket where the supervisor looks for it."""
    gateway = make_gateway(settings.data_dir)
    monkeypatch.setattr("edge_node.doctor.is_listening", lambda serving: asyncio.sleep(0, True))
    monkeypatch.setattr(gateways, "here", gateway)
    outside = Outside(None)
    server = ControlServer(
        gateway, control_socket(settings.data_dir), outside, SessionPort(gateway, outside)
    )
    await server.start()
    yield gateway
    await server.aclose()


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 42, free=size)
    )


def rooms(status: dict[str, Any]) -> list[str]:
    return [problem["room"] for problem in status["problems"]]


async def test_a_node_that_serves_and_is_in_trouble_says_both(
    settings: EdgeSettings, gateway: Gateway
) -> None:
    await gateway.load(V1, make_version(settings.data_dir, "v1"))
    gateway.point(V1)
    status = await node_status(settings)
    assert (status["ready"], status["not_ready"], status["problems"]) == (True, None, [])
    Problems(settings.data_dir).report("learner", "It ends.", "Look.")
    status = await node_status(settings)
    assert (status["ready"], rooms(status)) == (True, ["learner"])
    assert set(status["problems"][0]) == {"room", "text", "next_step", "since"}


async def test_what_a_full_disk_hides_is_shown(
    settings: EdgeSettings, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file can be written: vLLM's process tells what it knows, the disk is looked at here."""

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    gateway.problems.report("capture", "Answers are lost.", "Free space.")
    assert not (settings.data_dir / "problems" / "capture.json").exists()
    free(monkeypatch, 0)
    assert rooms(await node_status(settings)) == ["capture", "disk"]
    free(monkeypatch, 1 << 40)
    gateway.problems.clear("capture")
    assert rooms(await node_status(settings)) == []


async def test_a_stopped_node_still_says_what_it_ended_of(settings: EdgeSettings) -> None:
    Problems(settings.data_dir).report("serving", "vLLM did not start: no memory.", "Give it more.")
    Problems(settings.data_dir).report("disk", "It was nearly full.", "Free space.")
    status = await node_status(settings)
    assert (status["ready"], rooms(status)) == (False, ["serving"]), "the disk has room again"
    assert "socket" in status["not_ready"]


async def send_feedback(gateway: Gateway, interaction: str) -> int:
    body = f'{{"id": "{interaction}", "score": 1}}'.encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    answer = await FeedbackRoutes(lambda: gateway).post(
        Request({"type": "http", "method": "POST", "headers": []}, receive)
    )
    return answer.status_code


async def test_feedback_that_cannot_be_stored_is_a_problem_until_it_is(
    settings: EdgeSettings, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.store.add_interactions(
        [
            Interaction(
                id="c-1",
                created_at="now",
                model=V1,
                messages=[],
                answer="a",
                finish_reason="stop",
                endpoint="/v1",
                prompt_ids=(1,),
                answer_ids=(2,),
            )
        ]
    )
    broken = [True]
    real = gateway.store.give

    def give(*said: Any, **how: Any) -> Receipt:
        if broken:
            raise StorageError("The store cannot be written: disk full.")
        return real(*said, **how)

    monkeypatch.setattr(gateway.store, "give", give)
    assert await send_feedback(gateway, "c-1") == 503
    [problem] = gateway.problems.current()
    assert (problem.room, "disk full" in problem.text, "EDGE_DATA_DIR" in problem.next_step) == (
        "feedback",
        True,
        True,
    )
    broken.clear()
    assert await send_feedback(gateway, "c-1") == 200
    assert gateway.problems.current() == []


async def test_a_node_that_cannot_start_says_why_and_forgets_rooms_that_are_switched_off(
    tmp_path: Path,
) -> None:
    settings = make_node(tmp_path / "node", enabled=False)
    problems = Problems(settings.data_dir)
    for room in ("learner", "learning", "uploads"):
        problems.report(room, "Old news.", "Wait.")
    (settings.data_dir / "identity" / "identity.json").write_text("{")
    with pytest.raises(StorageError):
        await serve(settings)
    assert [problem.room for problem in problems.current()] == ["node", "uploads"]
    assert problems.current()[0].text.startswith("`edge-node serve` ended: ")


@pytest.mark.parametrize(
    ("learning", "words"),
    [
        ({"device": "cuda"}, "EDGE_LEARNING__DEVICE is 'cuda', and torch sees no CUDA device"),
        ({"target_modules": "mlp"}, "is 'mlp', which fits none of the base model's 14 modules"),
    ],
)
async def test_a_node_whose_rounds_could_not_start_does_not_start(
    tmp_path: Path, learning: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        await serve(make_node(tmp_path / "node", **learning))


async def test_the_second_supervisor_reports_nothing_into_the_firsts_directory(
    settings: EdgeSettings,
) -> None:
    with (
        own_data_dir(settings.data_dir),
        pytest.raises(StorageError, match="Another edge node runs"),
    ):
        await serve(settings)
    assert Problems(settings.data_dir).current() == []


async def test_a_node_that_is_not_enrolled_says_why_its_last_start_could_not(
    tmp_path: Path,
) -> None:
    settings = EdgeSettings.model_validate(
        {"data_dir": tmp_path / "node", "base": {"path": tiny_model()}}
    )
    with pytest.raises(EnrollmentError):  # there is no token
        await serve(settings)
    with pytest.raises(
        EnrollmentError,
        match="`edge-node serve` ended: This node is not enrolled and has no join token",
    ):
        await node_status(settings)
