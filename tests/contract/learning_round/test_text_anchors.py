"""Environments of texts where a node learns: they are measured, and nothing is learnt from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_node.learning.worker import Worker
from edge_node.settings import EdgeSettings, EnvironmentSpec
from protos.lora import LoraTensors
from protos.manifest import UpdateManifest
from tests.contract.learning_round.outboxes import outbox_of
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, make_node, meet

TEXTS = EnvironmentSpec(name="text", factory="tests.fakes.text_environment:Texts", anchor=True)


def trained(settings: EdgeSettings) -> dict[str, Any]:
    """The metrics of one round."""
    meet(settings, activate(settings, LoraTensors(), version=0).label, 6)
    assert Worker(settings, NODE_ID).step()
    (update,) = outbox_of(settings).list()
    return dict(UpdateManifest.from_bytes(outbox_of(settings).signed(update.update_id)[0]).metrics)


def test_a_round_takes_its_anchors_from_tasks_alone(tmp_path: Path) -> None:
    made = make_node(tmp_path, steps=1, anchor_pool=4, batch_anchor=4)
    both = made.model_copy(update={"environments": [TEXTS, *made.environments]})
    assert trained(both)["anchors"] == 4


def test_a_node_with_texts_alone_trains_without_anchors(tmp_path: Path) -> None:
    settings = make_node(tmp_path, steps=1).model_copy(update={"environments": [TEXTS]})
    assert trained(settings)["anchors"] == 0
