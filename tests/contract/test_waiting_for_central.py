"""A node that starts before central waits and says so; a refusal or a signal ends it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from central.fleet.tokens import PREFIX
from central.settings import CentralSettings as Central
from edge_node import main
from edge_node.doctor import node_status
from edge_node.errors import EnrollmentError
from edge_node.heartbeat import check_alive
from edge_node.problems import Problems
from edge_node.settings import BaseModelSettings, CentralSettings, EdgeSettings
from protos.operators.v1 import operators_pb2
from tests.contract.central_harness import make_settings, running_central
from tests.fakes import base_models

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Story:
    """A central that does not run, and a node with a token of it."""

    central: Central
    node: EdgeSettings
    token: str

    def said(self) -> str:
        return " ".join(
            f"{problem.room}: {problem.text}" for problem in Problems(self.node.data_dir).current()
        )

    @property
    def environment(self) -> dict[str, str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("EDGE_")}
        return clean | {
            "PYTHONPATH": str(ROOT),
            "EDGE_DATA_DIR": str(self.node.data_dir),
            "EDGE_BASE__PATH": str(self.node.base.path),
            "EDGE_CENTRAL__ENROLLMENT_ADDRESS": self.node.central.enrollment_address,
            "EDGE_CENTRAL__JOIN_TOKEN": self.token,
        }


@pytest.fixture
async def story(tmp_path: Path) -> Story:
    base_models.make(tmp_path / "base")  # of a known family: vLLM is not asked about it
    settings = make_settings(tmp_path)
    async with running_central(settings) as central:
        request = operators_pb2.CreateTokenRequest(cohort="shared", uses=1, valid_s=3600)
        token = (await central.operators.CreateToken(request, timeout=20)).token
    assert token.startswith(PREFIX)
    address = f"localhost:{settings.listen.enrollment_port}"
    node = EdgeSettings(
        data_dir=tmp_path / "node",
        base=BaseModelSettings(path=settings.base.path),
        central=CentralSettings.model_validate(
            {"enrollment_address": address, "join_token": token}
        ),
    )
    return Story(settings, node, token)


async def until(seen: object, timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while not seen():  # type: ignore[operator]
            await asyncio.sleep(0.02)


async def test_a_node_waits_for_central_and_says_so(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "ENROL_PAUSE_FIRST_S", 0.05)
    monkeypatch.setattr(main, "ENROL_PAUSE_LAST_S", 0.2)
    waiting = asyncio.create_task(main.enroll_when_central_answers(story.node))
    await until(lambda: "enrolment" in story.said())
    assert "Connection refused" in story.said()
    assert not waiting.done()
    async with running_central(story.central):
        identity = await asyncio.wait_for(waiting, 30)
    assert identity.cohort == "shared"
    assert story.said() == ""


async def test_a_refused_token_ends_the_node_at_once(story: Story) -> None:
    wrong = story.node.central.model_copy(update={"join_token": None})
    with pytest.raises(EnrollmentError, match="no join token"):
        await main.enroll_when_central_answers(story.node.model_copy(update={"central": wrong}))
    async with running_central(story.central):
        await main.enroll(story.node)  # the token's only use
        other = story.node.model_copy(update={"data_dir": story.node.data_dir.with_name("other")})
        with pytest.raises(EnrollmentError, match="used 1 of 1 times"):
            await main.enroll_when_central_answers(other)


async def test_a_waiting_node_is_alive_and_ends_with_a_signal(story: Story) -> None:
    async with edge_node(story, "serve") as process:
        await until(lambda: "enrolment" in story.said())
        assert check_alive(story.node.data_dir) < 30
        with pytest.raises(
            EnrollmentError, match=r"waits to be enrolled since .*Connection refused"
        ):
            await node_status(story.node)
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0, errors.decode()
    assert errors.decode().count("Connection refused") == 1, "repeats are not logged"


async def test_enroll_itself_does_not_wait(story: Story) -> None:
    unknown = "central.invalid:9444"
    for address, expected in (
        (story.node.central.enrollment_address, "Connection refused"),
        (unknown, unknown),
    ):
        environment = story.environment | {"EDGE_CENTRAL__ENROLLMENT_ADDRESS": address}
        async with edge_node(story, "enroll", environment=environment) as process:
            _, errors = await asyncio.wait_for(process.communicate(), 60)
        assert (process.returncode, expected in errors.decode()) == (4, True), errors.decode()


@asynccontextmanager
async def edge_node(
    story: Story, command: str, environment: dict[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edge_node.cli", command,
        cwd=ROOT, env=environment or story.environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
