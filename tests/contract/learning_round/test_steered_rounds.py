"""Rounds that an operator, a schedule and the users steer: the real learner on a tiny model."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_node import rounds as node_rounds
from edge_node.doctor import node_status
from edge_node.errors import StorageError
from edge_node.learning import steering as steerings
from edge_node.learning.orders import OrderRefused
from edge_node.learning.records import RoundStore
from edge_node.learning.reports import Progress, read_progress, report_folder
from edge_node.learning.steering import NodeSteering
from edge_node.learning.worker import Worker
from edge_node.problems import Problems
from edge_node.settings import EdgeSettings
from protos.lora import LoraTensors
from protos.manifest import UpdateManifest, sha256_hex
from tests.contract.learning_round.outboxes import outbox_of
from tests.contract.learning_round.test_grpo_node import GRPO, explorer
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, as_environment, make_node, meet
from tests.fakes.policy_vllm import policies_on_disk, sampling_vllm
from tests.fakes.tiny_model import tiny_adapter

ROOT = Path(__file__).resolve().parents[3]


def learned(data_dir: Path, count: int = 6, **learning: Any) -> EdgeSettings:
    settings = make_node(data_dir, **learning)
    meet(settings, activate(settings, tiny_adapter(5, strength=0.3), version=1).label, count)
    return settings


def rounds_of(settings: EdgeSettings) -> RoundStore:
    return RoundStore(settings.data_dir / "learning")


def states(settings: EdgeSettings) -> list[str]:
    return [end.state for end in rounds_of(settings).ends()]


def until(seen: Callable[[], object], what: str) -> None:
    ends = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < ends, what
        time.sleep(0.01)


@contextmanager
def learner(settings: EdgeSettings) -> Iterator[subprocess.Popen[bytes]]:
    """The worker in a process of its own; killed at the end."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("EDGE_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_node.learning.worker", "--parent", str(os.getpid())],
        env=clean | as_environment(settings) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """`act` runs when the learner of this process has told that step."""
    tell = NodeSteering.tell

    def told(self: NodeSteering, progress: Progress) -> None:
        tell(self, progress)
        if progress.step == step:
            act()

    monkeypatch.setattr(NodeSteering, "tell", told)


def test_a_cancelled_round_ends_and_a_kill_brings_nothing_back(tmp_path: Path) -> None:
    """First the learner hears it, then one that is killed as soon as the order is on disk."""
    settings = learned(tmp_path, steps=2000, checkpoint_steps=1000)
    folder = settings.data_dir / "learning" / "rounds"
    with learner(settings) as process:

        def progress() -> Progress | None:
            plan = rounds_of(settings).unfinished()
            return plan and read_progress(settings.data_dir, plan.round_id)

        until(progress, "the round makes a step")
        seen = progress()
        status = asyncio.run(node_status(settings))["round"]
        assert seen is not None
        assert seen.step <= status["step"] < 2000 == status["steps"]
        assert {"round_id", "loss", "eta_s", "seconds", "tokens"} <= status.keys()
        first = node_rounds.cancel_round(settings, None)
        until(lambda: not list(folder.iterdir()), "the learner clears the round away")
        assert process.poll() is None
        assert asyncio.run(node_status(settings))["round"] is None
        assert states(settings) == ["cancelled"]
        assert node_rounds.ask_for_round(settings, "sft")["method"] == "sft"
        until(progress, "the round that was asked for makes a step")
        second = node_rounds.cancel_round(settings, None)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert (first, second) == tuple(end.plan.round_id for end in rounds_of(settings).ends()[::-1])
    worker = Worker(settings, NODE_ID)
    assert not list(folder.iterdir()), "checkpoints of a killed learner are cleared away"
    assert not worker.step()
    assert states(settings) == ["cancelled", "cancelled"]
    assert not outbox_of(settings).list()
    assert not Problems(settings.data_dir).current()


def test_a_round_that_was_asked_for_starts_once_also_after_a_kill(tmp_path: Path) -> None:
    settings = learned(tmp_path, count=1, steps=3, min_examples=50, min_new_failures=20)
    assert not Worker(settings, NODE_ID).step(), "the policy waits"
    node_rounds.ask_for_round(settings, None)
    with learner(settings):
        pass  # killed before it read anything, or while it did
    worker = Worker(settings, NODE_ID)
    assert worker.step()
    assert not worker.step()
    assert states(settings) == ["finished"]
    (entry,) = outbox_of(settings).list()
    assert (
        UpdateManifest.from_bytes(outbox_of(settings).signed(entry.update_id)[0]).experiences == 1
    )


def test_a_wish_that_became_impossible_is_dropped(tmp_path: Path) -> None:
    settings = explorer(tmp_path)
    activate(settings, LoraTensors(), version=0)
    node_rounds.ask_for_round(settings, "grpo")
    without = settings.model_copy(update={"environments": settings.environments[:1]})
    assert not Worker(without, NODE_ID).step()
    assert node_rounds.open_wish(settings) is None


def test_an_update_and_a_cancel_never_both_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled after the last step, before the hand-over; and after the hand-over."""
    settings = learned(tmp_path / "before", steps=2)
    at_step(monkeypatch, 2, lambda: node_rounds.cancel_round(settings, None))
    assert Worker(settings, NODE_ID).step()
    assert (states(settings), list(outbox_of(settings).list())) == (["cancelled"], [])
    monkeypatch.undo()

    settings = learned(tmp_path / "after", steps=2)

    def killed(*args: object) -> None:
        raise StorageError("killed here")

    monkeypatch.setattr(RoundStore, "finish", killed)
    with pytest.raises(StorageError):
        Worker(settings, NODE_ID).step()
    monkeypatch.undo()
    with pytest.raises(OrderRefused, match="its update is in the outbox"):
        node_rounds.cancel_round(settings, None)
    assert Worker(settings, NODE_ID).step()
    assert states(settings) == ["finished"]


def test_a_round_that_a_schedule_paused_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, paused = (
        learned(tmp_path / name, steps=12, checkpoint_steps=5) for name in ("whole", "paused")
    )
    assert Worker(whole, NODE_ID).step()
    opened = False
    monkeypatch.setattr("edge_node.schedule.is_open", lambda windows: opened)
    worker = Worker(paused, NODE_ID)
    assert not worker.step()
    assert rounds_of(paused).last() is None, "no round starts outside of its windows"

    def close() -> None:
        nonlocal opened
        opened = False

    opened = True
    at_step(monkeypatch, 6, close)
    assert worker.step()
    plan = rounds_of(paused).unfinished()
    assert plan is not None
    progress = read_progress(paused.data_dir, plan.round_id)
    assert progress is not None
    assert (progress.step, progress.waits) == (7, "a window of EDGE_LEARNING__SCHEDULE")
    assert not worker.step()
    opened = True
    assert worker.step()
    assert states(paused) == ["finished"]
    digests = []
    for settings in (whole, paused):
        (entry,) = outbox_of(settings).list()
        digests.append(sha256_hex(outbox_of(settings).payload_path(entry.round_id).read_bytes()))
    assert digests[0] == digests[1]
    progress = read_progress(paused.data_dir, plan.round_id)
    assert progress is not None
    assert [entry["step"] for entry in progress.entries] == list(range(1, 13))
    assert (progress.waits, progress.eta_s) == ("", 0.0)


def test_a_grpo_round_is_paused_and_cancelled_without_a_policy_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = explorer(tmp_path, GRPO | {"steps": 6})
    activate(settings, tiny_adapter(3, rank=2, strength=0.2), version=1)
    opened = True
    monkeypatch.setattr("edge_node.schedule.is_open", lambda windows: opened)

    def close() -> None:
        nonlocal opened
        opened = False

    worker = Worker(settings, NODE_ID)
    with sampling_vllm(settings) as (vllm, _):
        with monkeypatch.context() as patches:
            at_step(patches, 1, close)
            assert worker.step()
        assert len(vllm.loaded) == 1, "a round that waits for hours has no policy in vLLM"
        opened = True
        at_step(monkeypatch, 4, lambda: node_rounds.cancel_round(settings, None))
        assert worker.step()
        assert len(vllm.loaded) == 1
        assert not worker.step(), "none starts by itself in its place"
    assert states(settings) == ["cancelled"]
    progress = node_rounds.show_round(settings, "1")["progress"]
    assert progress["step"] == 4
    assert 0 <= progress["reward"] <= 1
    assert not policies_on_disk(settings)
    assert not outbox_of(settings).list()


def test_a_step_waits_while_users_of_the_real_control_socket_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = learned(tmp_path, steps=2, yield_in_flight=0, yield_at_most_s=60)
    waits: list[str] = []
    with sampling_vllm(settings) as (_, gateway):
        release = str(gateway.aliases.target)
        at_step(monkeypatch, 1, lambda: gateway.aliases.enter(release))

        def slept(seconds: float) -> None:
            waits.append(node_rounds.show_round(settings, "1")["progress"]["waits"])
            if len(waits) == 3:
                gateway.aliases.leave(release)

        monkeypatch.setattr(steerings.time, "sleep", slept)
        assert Worker(settings, NODE_ID).step()
    assert waits == ["users' requests"] * 3
    assert states(settings) == ["finished"]


def test_tensorboard_files_are_kept_after_the_round(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="pip install tensorboardX")
    settings = learned(tmp_path, steps=3, tensorboard=True)
    assert Worker(settings, NODE_ID).step()
    (end,) = rounds_of(settings).ends()
    (file,) = (report_folder(settings.data_dir, end.plan.round_id) / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()
