"""Rounds with the real TRL and PEFT on a tiny random Llama."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sqlite3
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
from edge_node.learning.records import RoundPlan, RoundStore
from edge_node.learning.round import release_directory, train_on_experience
from edge_node.learning.worker import Worker, main
from edge_node.outbox import Outbox
from edge_node.problems import Problems
from edge_node.rendering import ChatFormat
from edge_node.settings import EdgeSettings, load_settings
from protos.base import read_base_model
from protos.lora import LoraModule, LoraTensors, decode, encode
from protos.manifest import Payload, Start, UpdateManifest, sha256_hex, verify
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, as_environment, make_node, meet
from tests.fakes.tiny_model import answer_ids, prompt_ids, tiny_adapter, tiny_model, write_peft

ROOT = Path(__file__).resolve().parents[2]


def outbox_of(settings: EdgeSettings) -> Outbox:
    return Outbox(settings.data_dir / "outbox", "auto")


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
    verify(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), manifest_bytes, signature)
    manifest = UpdateManifest.from_bytes(manifest_bytes)
    payload = outbox.payload_path(entry.round_id).read_bytes()
    update = decode(payload)
    assert manifest.start.release == release.digest
    assert manifest.start.payload == release.payload.digest_sha256
    assert (manifest.start.prefix_rank, manifest.rank, manifest.sequence) == (4, 4, 1)
    assert manifest.base == identity.base
    assert manifest.supersedes is None
    assert manifest.metrics["steps"] == 6
    assert manifest.metrics["examples"] == 8
    assert set(update.modules) == set(read_base_model(tiny_model()).module_shapes)
    assert {module.scale for module in update.modules.values()} == {3.0}
    assert all(np.abs(module.B).max() > 0 for module in update.modules.values())

    plan = RoundStore(settings.data_dir / "learning").last()
    assert plan is not None
    assert plan.learning_rate == pytest.approx(5e-3 * 0.7**2)
    again = train_on_experience(
        plan, settings, release_directory(settings.data_dir, plan.release_id), tmp_path / "again"
    )
    assert encode(again.tensors) == payload, "the same round must give the same bytes"

    start = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32),
        str(release_directory(settings.data_dir, release.digest)),
    ).merge_and_unload()
    ids = torch.tensor([[5, 20, 30, 40, 6, 50, 60]])
    before = start(ids).logits.detach().clone()
    merged = PeftModel.from_pretrained(start, str(write_peft(update, tmp_path / "update"))).merge_and_unload()
    after = merged(ids).logits.detach()
    trained = again.model.eval()(ids).logits.detach()
    assert (trained - after).abs().max() < 1e-3
    assert (trained - before).abs().max() > 0.1


def test_round_learns_its_examples(tmp_path: Path) -> None:
    settings = make_node(tmp_path, steps=40, learning_rate=2e-2)
    release = activate(settings, LoraTensors(), version=0)
    meet(settings, release.label, 6)
    assert Worker(settings, NODE_ID).step()
    outbox = outbox_of(settings)
    metrics = UpdateManifest.from_bytes(outbox.signed(outbox.list()[0].update_id)[0]).metrics
    assert metrics["loss_last"] < metrics["loss_first"] / 2


def test_second_round_from_the_same_start_waits_for_failures_and_supersedes(tmp_path: Path) -> None:
    settings = make_node(tmp_path, steps=2)
    release = activate(settings, LoraTensors(), version=0)
    meet(settings, release.label, 6)
    worker = Worker(settings, NODE_ID)
    assert worker.step()
    assert not worker.step()
    meet(settings, "v9-00000000", 5, first=50)
    assert not worker.step(), "failures of another version do not count"
    meet(settings, release.label, 2, first=100)
    assert worker.step()
    outbox = outbox_of(settings)
    first, second = outbox.list()
    manifest = UpdateManifest.from_bytes(outbox.signed(second.update_id)[0])
    assert manifest.supersedes == first.update_id
    assert manifest.sequence == 2
    assert not list((settings.data_dir / "learning/rounds").iterdir()), "checkpoints are removed"


def test_superseding_round_is_given_up_when_the_node_moves_on(tmp_path: Path) -> None:
    settings = make_node(tmp_path, steps=4)
    old = activate(settings, LoraTensors(), version=0)
    meet(settings, old.label, 6)
    worker = Worker(settings, NODE_ID)
    assert worker.step()
    meet(settings, old.label, 3, first=50)
    plan = worker._next_round()
    assert plan is not None
    assert plan.release_id == old.digest
    new = activate(settings, tiny_adapter(1), version=1)
    assert worker.step()
    assert len(outbox_of(settings).list()) == 1
    assert RoundStore(settings.data_dir / "learning").unfinished() is None
    meet(settings, new.label, 3, first=60)
    assert worker.step()
    assert [entry.start_release for entry in outbox_of(settings).list()] == [old.digest, new.digest]


def test_first_round_from_a_start_is_finished_although_the_node_moved_on(tmp_path: Path) -> None:
    settings = make_node(tmp_path, steps=2)
    old = activate(settings, LoraTensors(), version=0)
    meet(settings, old.label, 6)
    worker = Worker(settings, NODE_ID)
    assert worker._next_round() is not None
    activate(settings, tiny_adapter(1), version=1)
    assert worker.step()
    assert [entry.start_release for entry in outbox_of(settings).list()] == [old.digest]


def test_round_on_a_prefix_names_its_rank_and_ends_when_the_rank_changes(tmp_path: Path) -> None:
    settings = make_node(tmp_path, steps=2, rank=2)
    whole = tiny_adapter(1, rank=4)
    release = activate(settings, whole, version=1)
    folder = release_directory(settings.data_dir, release.digest)
    pairs = {name: LoraModule(m.A[:3].copy(), m.B[:, :3].copy()) for name, m in whole.modules.items()}
    write_peft(LoraTensors(pairs), folder)
    meet(settings, release.label, 6)
    worker = Worker(settings, NODE_ID)
    assert worker.step()
    (entry,) = outbox_of(settings).list()
    start = UpdateManifest.from_bytes(outbox_of(settings).signed(entry.update_id)[0]).start
    assert (start.release, start.payload, start.prefix_rank) == (release.digest, release.payload.digest_sha256, 3)
    meet(settings, release.label, 3, first=50)
    assert worker._next_round() is not None
    write_peft(whole, folder)
    assert worker.step()
    assert len(outbox_of(settings).list()) == 1
    with sqlite3.connect(settings.data_dir / "learning" / "rounds.db") as rounds:
        states = rounds.execute("SELECT state, result FROM rounds ORDER BY number").fetchall()
    assert [state for state, _ in states] == ["finished", "abandoned"]
    assert "EDGE_RELEASES__MAX_RANK was changed" in states[1][1]


def test_round_that_was_handed_over_but_not_recorded_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_node(tmp_path, steps=2)
    meet(settings, activate(settings, LoraTensors(), version=0).label, 6)
    worker = Worker(settings, NODE_ID)
    plan = worker._next_round()
    assert plan is not None
    payload = encode(tiny_adapter(1))
    manifest = UpdateManifest(
        node_id=NODE_ID,
        sequence=1,
        base="b" * 64,
        start=Start(release=plan.release_id, payload="c" * 64, prefix_rank=0, dtype="float32"),
        rank=1,
        payload=Payload(digest_sha256=sha256_hex(payload), size_bytes=len(payload)),
        round_id=plan.round_id,
        experiences=6,
        created_at=plan.created_at,
        software="test",
    ).to_bytes()
    update_id = outbox_of(settings).add(plan.round_id, manifest, b"signature", payload)
    monkeypatch.delattr("edge_node.learning.round.train_on_experience")
    assert worker.step()
    assert RoundStore(settings.data_dir / "learning").unfinished() is None
    with sqlite3.connect(settings.data_dir / "learning" / "rounds.db") as rounds:
        assert rounds.execute("SELECT state, result FROM rounds").fetchall() == [("finished", update_id)]


def test_round_that_cannot_be_trained_is_abandoned_and_the_next_one_starts(tmp_path: Path) -> None:
    settings = make_node(tmp_path, steps=2)
    old = activate(settings, tiny_adapter(1), version=1)
    meet(settings, old.label, 6)
    worker = Worker(settings, NODE_ID)
    assert worker._next_round() is not None
    shutil.rmtree(release_directory(settings.data_dir, old.digest))
    new = activate(settings, tiny_adapter(2), version=2)
    assert worker.step()
    assert not outbox_of(settings).list()
    (problem,) = Problems(settings.data_dir).current()
    assert problem.room == "learning"
    assert "was abandoned: Release" in problem.text
    assert not worker.step()
    assert Problems(settings.data_dir).current() == [problem], "it stays until a round is finished"
    meet(settings, new.label, 3, first=60)
    assert worker.step()
    assert Problems(settings.data_dir).current() == []
    assert [entry.start_release for entry in outbox_of(settings).list()] == [new.digest]


def test_killed_round_resumes_to_the_same_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected, killed = (make_node(tmp_path / name, steps=60, checkpoint_steps=5) for name in ("whole", "killed"))
    for settings in (expected, killed):
        release = activate(settings, tiny_adapter(5, strength=0.3), version=1)
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
    (half / "adapter_model.safetensors").write_bytes((half / "adapter_model.safetensors").read_bytes()[:1000])

    with caplog.at_level(logging.INFO):
        assert Worker(killed, NODE_ID).step()
    resumed = [record.checkpoint for record in caplog.records if record.message == "round resumes"]
    assert resumed == [found[0].name]
    payloads = []
    for settings in (expected, killed):
        outbox = outbox_of(settings)
        (entry,) = outbox.list()
        payloads.append(sha256_hex(outbox.payload_path(entry.round_id).read_bytes()))
    assert payloads[0] == payloads[1]


def test_a_round_trains_on_the_ids_that_were_served(tmp_path: Path) -> None:
    """Not on what the messages would be rendered to: here they say something else."""
    settings = make_node(tmp_path, steps=1, min_examples=1, batch_anchor=0)
    release = activate(settings, LoraTensors(), version=0)
    meet(settings, release.label, 6)
    store = ExperienceStore(settings.data_dir / "experience.db")
    served = Interaction(
        "chat-7", "2026-11-22T00:00:00Z", f"lorikeet@{release.label}", [{"role": "user", "content": [{"odd": 1}]}],
        "", "tool_calls", "/v1/chat/completions", prompt_ids=(4, 20, 21, 5), answer_ids=(30, 31, 2),
    )  # fmt: skip
    store.add_interactions([served])
    store.add_feedback(Feedback("chat-7", score=1.0), max_tokens=99)
    seen: list[list[int]] = []

    def keep(plan: RoundPlan, *, own: Sequence[Lesson], **_: Any) -> None:
        seen.extend(token_row(lesson).input_ids for lesson in own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_node.learning.round.train_round", keep)
        plan = Worker(settings, NODE_ID)._next_round()
        assert plan is not None
        train_on_experience(plan, settings, release_directory(settings.data_dir, plan.release_id), tmp_path / "w")
    assert [4, 20, 21, 5, 30, 31, 2] in seen
    assert [*prompt_ids("w0 w1 w2"), *answer_ids("w200 w3")] in seen


def test_what_cannot_be_learnt_starts_no_round_and_is_a_problem(tmp_path: Path) -> None:
    settings = make_node(tmp_path, steps=1)
    release = activate(settings, LoraTensors(), version=0)
    store = ExperienceStore(settings.data_dir / "experience.db")
    problems = Problems(settings.data_dir)
    for number in range(6):
        fields = (
            f"x-{number}",
            "2026-11-22T00:00:00Z",
            f"lorikeet@{release.label}",
            [],
            "w0",
            "stop",
            "/v1/completions",
        )
        reason = "the prompt holds more than text"
        store.add_interactions([Interaction(*fields, prompt_ids=(), answer_ids=(), unusable=reason)])
        store.add_feedback(Feedback(f"x-{number}", correction="w1", correction_ids=(9, 2)), max_tokens=99)
    worker = Worker(settings, NODE_ID)
    assert not worker.step()
    (problem,) = problems.current()
    assert (problem.room, "0 corrected or verified answers can be learnt from" in problem.text) == ("learning", True)
    assert "6 because the prompt holds more than text" in problem.text
    meet(settings, release.label, 6)
    assert worker.step()
    assert problems.current() == []
    manifest = UpdateManifest.from_bytes(outbox_of(settings).signed(outbox_of(settings).list()[0].update_id)[0])
    assert manifest.experiences == manifest.metrics["examples"] == 3, "one batch of three is what it was trained on"


def test_anchors_that_cannot_be_used_stop_the_learner_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_node(tmp_path, steps=1)
    meet(settings, activate(settings, LoraTensors(), version=0).label, 6)
    ChatFormat(template="{{ raise_exception('no') }}").write(settings.data_dir)
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert main([]) == 2
    said = capsys.readouterr().err
    assert "learner: Environment 'words' is an anchor, and the chat template refuses its train task 'train/" in said
    assert "TemplateError" in said
    (settings.data_dir / "chat_format.json").unlink()
    monkeypatch.setenv("EDGE_SERVING__MAX_MODEL_LEN", "16")
    worker = Worker(load_settings(), NODE_ID)
    assert worker.step(), "anchors of five tokens fit"


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
        second.modules["model.layers.0.mlp.up_proj"].A, factors.modules["model.layers.0.mlp.up_proj"].A
    )
