"""Which round is trained, and which is superseded, given up, abandoned or not possible."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from edge_node.experience import ExperienceStore, Feedback, Interaction
from edge_node.learning.records import RoundStore
from edge_node.learning.round import release_directory
from edge_node.learning.worker import Worker, main
from edge_node.problems import Problems
from edge_node.rendering import ChatFormat
from edge_node.settings import load_settings
from protos.lora import LoraModule, LoraTensors, encode
from protos.manifest import Payload, Start, UpdateManifest, sha256_hex
from tests.contract.learning_round.outboxes import outbox_of
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, as_environment, make_node, meet
from tests.fakes.tiny_model import tiny_adapter, write_peft


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
    pairs = {
        name: LoraModule(m.A[:3].copy(), m.B[:, :3].copy()) for name, m in whole.modules.items()
    }
    write_peft(LoraTensors(pairs), folder)
    meet(settings, release.label, 6)
    worker = Worker(settings, NODE_ID)
    assert worker.step()
    (entry,) = outbox_of(settings).list()
    start = UpdateManifest.from_bytes(outbox_of(settings).signed(entry.update_id)[0]).start
    assert (start.release, start.payload, start.prefix_rank) == (
        release.digest,
        release.payload.digest_sha256,
        3,
    )
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
        assert rounds.execute("SELECT state, result FROM rounds").fetchall() == [
            ("finished", update_id)
        ]


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
        store.add_interactions(
            [Interaction(*fields, prompt_ids=(), answer_ids=(), unusable=reason)]
        )
        store.add_feedback(
            Feedback(f"x-{number}", correction="w1", correction_ids=(9, 2)), max_tokens=99
        )
    worker = Worker(settings, NODE_ID)
    assert not worker.step()
    (problem,) = problems.current()
    assert (problem.room, "0 corrected or verified answers can be learnt from" in problem.text) == (
        "learning",
        True,
    )
    assert "6 because the prompt holds more than text" in problem.text
    meet(settings, release.label, 6)
    assert worker.step()
    assert problems.current() == []
    manifest = UpdateManifest.from_bytes(
        outbox_of(settings).signed(outbox_of(settings).list()[0].update_id)[0]
    )
    assert manifest.experiences == manifest.metrics["examples"] == 3, (
        "one batch of three is what it was trained on"
    )


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
    assert (
        "learner: Environment 'words' is an anchor, and the chat template refuses its "
        "train task 'train/" in said
    )
    assert "TemplateError" in said
    (settings.data_dir / "chat_format.json").unlink()
    monkeypatch.setenv("EDGE_SERVING__MAX_MODEL_LEN", "16")
    worker = Worker(load_settings(), NODE_ID)
    assert worker.step(), "anchors of five tokens fit"
