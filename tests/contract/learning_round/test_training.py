"""What a round learns, with the real TRL and PEFT on a tiny random Llama."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from peft import PeftModel
from transformers import AutoModelForCausalLM

from edge_node.experience import ExperienceStore, Feedback, Interaction
from edge_node.identity import Identity
from edge_node.learning.batches import Lesson, token_row
from edge_node.learning.checkpoints import newest_valid
from edge_node.learning.plans import RoundPlan
from edge_node.learning.records import RoundStore
from edge_node.learning.round import release_directory, train_on_experience
from edge_node.learning.training import TrainedRound
from edge_node.learning.worker import Worker
from edge_node.learning.workplace import Workplace, find_workplace
from edge_node.settings import EdgeSettings
from protos.base import read_base_model
from protos.lora import LoraTensors, decode, encode
from protos.manifest import UpdateManifest, sha256_hex, verify
from tests.contract.learning_round.outboxes import outbox_of
from tests.fakes.anchors import make_tiny_anchors
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, as_environment, make_node, meet
from tests.fakes.tiny_model import answer_ids, prompt_ids, tiny_adapter, tiny_model, write_peft

ROOT = Path(__file__).resolve().parents[3]


def train_here(plan: RoundPlan, settings: EdgeSettings, folder: Path, **watch: Any) -> TrainedRound:
    release = release_directory(settings.data_dir, plan.release_id)
    place = find_workplace(plan, settings, release, folder, **watch)
    return train_on_experience(plan, settings, place)


def test_update_of_a_round_merged_by_peft_equals_the_trained_model(tmp_path: Path) -> None:
    settings = make_node(tmp_path / "node", steps=6, rank=4, alpha=12)
    release = activate(settings, tiny_adapter(3, rank=4, strength=0.3), version=2)
    meet(settings, release.label, 8)
    assert Worker(settings, NODE_ID).step()

    outbox = outbox_of(settings)
    (entry,) = outbox.list()
    manifest_bytes, signature = outbox.signed(entry.update_id)
    identity = Identity.load(settings.data_dir)
    public = identity.key.public_key()
    verify(
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        manifest_bytes,
        signature,
    )
    manifest = UpdateManifest.from_bytes(manifest_bytes)
    payload = outbox.payload_path(entry.round_id).read_bytes()
    update = decode(payload)
    assert manifest.start.release == release.digest
    assert manifest.start.payload == release.payload.digest_sha256
    assert (manifest.start.prefix_rank, manifest.rank, manifest.sequence) == (4, 4, 1)
    assert manifest.base == identity.base
    assert manifest.encoding == "float32", "central has offered nothing yet"
    assert manifest.supersedes is None
    assert manifest.metrics["steps"] == 6
    assert manifest.metrics["examples"] == 8
    assert set(update.modules) == set(read_base_model(tiny_model()).module_shapes)
    assert {module.scale for module in update.modules.values()} == {3.0}
    assert all(np.abs(module.B).max() > 0 for module in update.modules.values())

    plan = RoundStore(settings.data_dir / "learning").last()
    assert plan is not None
    assert plan.learning_rate == pytest.approx(5e-3 * 0.7**2)
    again = train_here(plan, settings, tmp_path / "again")
    assert encode(again.tensors) == payload, "the same round must give the same bytes"

    start = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32),
        str(release_directory(settings.data_dir, release.digest)),
    ).merge_and_unload()
    ids = torch.tensor([[5, 20, 30, 40, 6, 50, 60]])
    before = start(ids).logits.detach().clone()
    merged = PeftModel.from_pretrained(
        start, str(write_peft(update, tmp_path / "update"))
    ).merge_and_unload()
    after = merged(ids).logits.detach()
    trained = again.model.eval()(ids).logits.detach()
    assert (trained - after).abs().max() < 1e-3
    assert (trained - before).abs().max() > 0.1


def test_round_learns_its_examples_and_sends_them_as_central_offers(tmp_path: Path) -> None:
    settings = make_node(tmp_path, steps=40, learning_rate=2e-2)
    release = activate(settings, LoraTensors(), version=0)
    meet(settings, release.label, 6)
    offer = {"offer_id": "o-1", "max_rank": 64, "encodings": ["float32", "bf16"]}
    (settings.data_dir / "releases" / "offer.json").write_text(json.dumps(offer))
    assert Worker(settings, NODE_ID).step()
    outbox = outbox_of(settings)
    (entry,) = outbox.list()
    manifest = UpdateManifest.from_bytes(outbox.signed(entry.update_id)[0])
    assert manifest.metrics["loss_last"] < manifest.metrics["loss_first"] / 2
    assert manifest.encoding == "bf16"
    assert 1e-4 < manifest.encoding_error < 0.005
    payload = outbox.payload_path(entry.round_id).read_bytes()
    assert encode(decode(payload), "bf16") == payload


def test_each_layer_of_a_step_is_a_sign_of_life(tmp_path: Path) -> None:
    """Forward and backward: a single step may take many minutes, whatever it trains."""
    settings = make_node(tmp_path, steps=2, target_modules=["layers.0.self_attn.q_proj"])
    meet(settings, activate(settings, LoraTensors(), version=0).label, 6)
    plan = Worker(settings, NODE_ID)._next_round()
    assert plan is not None
    beats: list[float] = []
    train_here(plan, settings, tmp_path / "w", beat=lambda: beats.append(time.monotonic()))
    layers = len(read_base_model(tiny_model()).module_shapes)
    assert len(beats) > 2 * 1.5 * layers


@pytest.mark.parametrize(
    ("dtype", "keeps"), [("float32", False), ("float32", True), ("bfloat16", False)]
)
def test_killed_round_resumes_to_the_same_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str, keeps: bool
) -> None:
    """With anchor environments, and with the base's own samples; with replay."""
    anchors = make_tiny_anchors(tmp_path / "anchors") if keeps else None
    expected, killed = (
        make_node(
            tmp_path / name, steps=60, checkpoint_steps=5, dtype=dtype, anchors=anchors,
            batch_replay=1, max_examples=30,
        )
        for name in ("whole", "killed")
    )  # fmt: skip
    for settings in (expected, killed):
        release = activate(settings, tiny_adapter(5, strength=0.3), version=1)
        meet(settings, "v0-00000000", 12, first=50)
        meet(settings, release.label, 30)
    assert Worker(expected, NODE_ID).step()

    clean = {key: value for key, value in os.environ.items() if not key.startswith("EDGE_")}
    child = subprocess.Popen(
        [sys.executable, "-m", "edge_node.learning.worker", "--parent", str(os.getpid())],
        env=clean | as_environment(killed) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    rounds = killed.data_dir / "learning/rounds"
    deadline = time.monotonic() + 120
    while not list(rounds.glob("*/checkpoint-*/sealed.json")):
        assert child.poll() is None, "the worker ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    assert not outbox_of(killed).list()
    plan = RoundStore(killed.data_dir / "learning").unfinished()
    assert plan is not None
    workspace = rounds / plan.round_id
    found = newest_valid(workspace)
    assert found is not None
    # What a kill leaves in the middle of a later checkpoint: some files whole, one cut short.
    half = workspace / "checkpoint-59"
    shutil.copytree(found[0], half)
    (half / "adapter_model.safetensors").write_bytes(
        (half / "adapter_model.safetensors").read_bytes()[:1000]
    )

    with caplog.at_level(logging.INFO):
        assert Worker(killed, NODE_ID).step()
    resumed = [record.checkpoint for record in caplog.records if record.message == "round resumes"]
    assert resumed == [found[0].name]
    payloads, kept = [], []
    for settings in (expected, killed):
        outbox = outbox_of(settings)
        (entry,) = outbox.list()
        payloads.append(sha256_hex(outbox.payload_path(entry.round_id).read_bytes()))
        metrics = UpdateManifest.from_bytes(outbox.signed(entry.update_id)[0]).metrics
        kept.append({name: value for name, value in metrics.items() if name != "seconds"})
    assert payloads[0] == payloads[1]
    assert kept[0] == kept[1]
    assert ("kl_first" in kept[0]) == keeps


def test_a_round_trains_on_the_ids_that_were_served(tmp_path: Path) -> None:
    """Not on what the messages would be rendered to: here they say something else."""
    settings = make_node(tmp_path, steps=1, min_examples=1, batch_anchor=0)
    release = activate(settings, LoraTensors(), version=0)
    meet(settings, release.label, 6)
    store = ExperienceStore(settings.data_dir / "experience.db")
    served = Interaction(
        "chat-7", "2026-11-22T00:00:00Z", f"lorikeet@{release.label}",
        [{"role": "user", "content": [{"odd": 1}]}], "", "tool_calls",
        "/v1/chat/completions", prompt_ids=(4, 20, 21, 5), answer_ids=(30, 31, 2),
    )  # fmt: skip
    store.add_interactions([served])
    store.add_feedback(Feedback("chat-7", score=1.0), max_tokens=99)
    seen: list[list[int]] = []

    def keep(plan: RoundPlan, place: Workplace, *, own: Sequence[Lesson], **_: Any) -> None:
        seen.extend(token_row(lesson).input_ids for lesson in own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_node.learning.round.train_round", keep)
        plan = Worker(settings, NODE_ID)._next_round()
        assert plan is not None
        train_here(plan, settings, tmp_path / "w")
    assert [4, 20, 21, 5, 30, 31, 2] in seen
    assert [*prompt_ids("w0 w1 w2"), *answer_ids("w200 w3")] in seen


def test_flower_client_app_trains_the_same_round(tmp_path: Path) -> None:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

    from edge_node.federation.client_app import make_client_app, read_arrays, write_arrays

    settings = make_node(tmp_path, steps=3)
    release = activate(settings, LoraTensors(), version=0)
    meet(settings, release.label, 6)
    context = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})
    app = make_client_app(lambda _: settings)

    def train(arrays: ArrayRecord, number: int) -> RecordDict:
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"round": number})})
        reply = app(Message(content, dst_node_id=7, message_type="train"), context)
        assert not reply.has_error()
        return reply.content

    first = train(ArrayRecord(), 1)
    factors = read_arrays(first.array_records["arrays"])
    assert set(factors.modules) == set(read_base_model(tiny_model()).module_shapes)
    assert first.metric_records["metrics"]["num-examples"] == 6
    assert write_arrays(factors).keys() == first.array_records["arrays"].keys()
    second = read_arrays(train(first.array_records["arrays"], 2).array_records["arrays"])
    assert second.rank == factors.rank == 8
    assert not np.array_equal(
        second.modules["model.layers.0.mlp.up_proj"].A,
        factors.modules["model.layers.0.mlp.up_proj"].A,
    )
