"""A round whose anchor's environment does not work: it waits, is told, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_node.learning import worker as worker_module
from edge_node.learning.records import RoundStore
from edge_node.learning.worker import Worker
from edge_node.problems import Problems
from edge_node.settings import EnvironmentSpec
from protos.lora import LoraTensors
from tests.contract.learning_round.outboxes import outbox_of
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, make_node, meet


def test_a_round_waits_for_its_anchors_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "FIRST_WAIT_S", 0.0)
    mended = tmp_path / "mended"
    broken = EnvironmentSpec(
        name="acme",
        factory="tests.fakes.broken_environments:Tasks",
        options={"how": "crash", "mended": str(mended)},
        anchor=True,
    )
    settings = make_node(tmp_path / "node", steps=2).model_copy(update={"environments": [broken]})
    meet(settings, activate(settings, LoraTensors(), version=0).label, 6)
    worker = Worker(settings, NODE_ID)
    assert worker.step()
    plan = RoundStore(settings.data_dir / "learning").unfinished()
    assert plan is not None
    (problem,) = Problems(settings.data_dir).current()
    assert problem.room == "learning"
    assert f"Round {plan.round_id} waits for an environment" in problem.text
    assert "Environment 'acme' ended in tasks (killed by SIGSEGV)" in problem.text
    assert "edge-node environments check acme" in problem.next_step
    mended.touch()
    assert worker.step()
    assert outbox_of(settings).of_round(plan.round_id) is not None
    assert Problems(settings.data_dir).current() == []
