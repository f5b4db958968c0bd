"""A round that is kept near the base on the base's own samples."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from edge_node.errors import SettingsError
from edge_node.learning import keeping
from edge_node.learning.anchors import read_anchors
from edge_node.learning.keeping import KeepingTrainer, kl_to_base
from edge_node.learning.records import RoundStore
from edge_node.learning.teacher import base_states, expect_base, head_logits
from edge_node.learning.text_model import load_text_model
from edge_node.learning.training import load_start
from edge_node.learning.worker import Worker, main
from protos.base import read_base_model
from protos.lora import LoraTensors
from protos.manifest import UpdateManifest
from tests.contract.learning_round.outboxes import outbox_of
from tests.fakes.anchors import lines, make_tiny_anchors
from tests.fakes.families import build_family
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, as_environment, make_node, meet
from tests.fakes.tiny_model import tiny_adapter, tiny_model, write_peft

ROWS = [[1, 20, 30, 40, 50], [4, 60, 61], [1, 99, 98, 97]]


def train(data_dir: Path, anchors: Path, start: LoraTensors, **learning: Any) -> dict[str, float]:
    """The metrics of a round from `start`."""
    settings = make_node(data_dir, anchors=anchors, batch_anchor=6, **learning)
    release = activate(settings, start, version=int(bool(start.modules)))
    meet(settings, release.label, 8)
    assert Worker(settings, NODE_ID).step()
    outbox = outbox_of(settings)
    (entry,) = outbox.list()
    return UpdateManifest.from_bytes(outbox.signed(entry.update_id)[0]).metrics


def dense_kl(base: Any, student: Any, rows: list[list[int]]) -> torch.Tensor:
    """Straight from the definition, row by row."""
    total, tokens = torch.zeros(()), 0
    for row in rows:
        with torch.no_grad():
            teacher = log_softmax(base(torch.tensor([row])).logits[0], -1)
        mine = log_softmax(student(torch.tensor([row])).logits[0], -1)
        total = total + (teacher.exp() * (teacher - mine)).sum()
        tokens += len(row)
    return total / tokens


@pytest.mark.parametrize("chunk", [1 << 25, 500])
def test_divergence_and_gradient_equal_a_dense_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(keeping, "CHUNK_LOGITS", chunk)
    base = load_text_model(tiny_model())
    release = write_peft(tiny_adapter(3, strength=0.5), tmp_path / "release")
    student = load_start(tiny_model(), release)
    for model in (base, student):
        model.get_output_embeddings().weight.requires_grad_(False)
    width = max(map(len, ROWS))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ROWS])
    states = torch.cat([base_states(base, row) for row in ROWS])
    weight = student.model.layers[0].self_attn.q_proj.weight

    found = kl_to_base(student, ids, mask, states)
    (gradient,) = torch.autograd.grad(3 * found, weight)
    expected = dense_kl(base, student, ROWS) * sum(map(len, ROWS))
    (dense_gradient,) = torch.autograd.grad(3 * expected, weight)
    assert found.item() > 0.1
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, dense_gradient, rtol=1e-3, atol=1e-5)
    assert kl_to_base(base, ids, mask, states).item() == pytest.approx(0, abs=1e-6)


def test_at_the_base_the_divergence_is_nothing_and_with_kl_it_stays_lower(tmp_path: Path) -> None:
    anchors = make_tiny_anchors(tmp_path / "anchors")
    options: dict[str, Any] = {"steps": 20, "learning_rate": 2e-2}
    near, far = (
        train(tmp_path / f"kl-{kl}", anchors, LoraTensors(), kl=kl, **options) for kl in (1.0, 0.0)
    )
    assert near["kl_first"] == far["kl_first"] < 1e-3
    assert near["anchors"] == 9
    assert far["kl_last"] > 0.1
    assert near["kl_last"] < far["kl_last"] / 2
    assert near["loss_last"] < near["loss_first"] / 2, "it learns all the same"
    assert near["loss_last"] > near["kl_last"] > 0, "the loss holds the divergence"


def test_the_teacher_is_the_base_whatever_release_the_round_starts_from(tmp_path: Path) -> None:
    two = lines(tmp_path / "two", "open", [{"question": "w3"}, {"question": "w5 w6"}])
    anchors = make_tiny_anchors(tmp_path / "anchors", plain=2, open_file=two)
    start = tiny_adapter(5, strength=0.4)
    metrics = train(tmp_path / "round", anchors, start, steps=1)
    samples = read_anchors(anchors, read_base_model(tiny_model()).digest).samples
    assert metrics["anchors"] == len(samples) == 6, "the only batch holds each sample once"
    base = load_text_model(tiny_model())
    merged = load_start(tiny_model(), write_peft(start, tmp_path / "start"))
    expected = dense_kl(base, merged, [sample.ids for sample in samples])
    assert metrics["kl_first"] == pytest.approx(expected.item(), rel=0.02)
    assert expected.item() > 0.05


def test_the_losses_of_a_batchs_rows_add_up_to_the_batchs_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a batch may be computed in parts."""
    compute_loss, seen = KeepingTrainer.compute_loss, []

    def compare(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = [
            {name: values[row : row + 1] for name, values in inputs.items()}
            for row in range(len(inputs["sample"]))
        ]
        parts = [compute_loss(self, model, row, *args, **kwargs).item() for row in rows]
        self._metrics["train"]["kl_base"].clear()
        whole = compute_loss(self, model, inputs, *args, **kwargs)
        seen.append((sum(parts), whole.item(), len(rows)))
        return whole

    monkeypatch.setattr(KeepingTrainer, "compute_loss", compare)
    anchors = make_tiny_anchors(tmp_path / "anchors")
    metrics = train(tmp_path / "round", anchors, tiny_adapter(5, strength=0.4), steps=1)
    ((parts, whole, rows),) = seen
    assert rows == 3 + 6
    assert parts == pytest.approx(whole, rel=1e-4)
    assert metrics["loss_last"] == pytest.approx(whole, rel=1e-4)
    assert 0 < metrics["kl_last"] < whole


def test_a_round_whose_anchors_were_changed_is_abandoned(tmp_path: Path) -> None:
    first, second = (make_tiny_anchors(tmp_path / f"a{seed}", seed=seed) for seed in (0, 1))
    settings = make_node(tmp_path / "node", anchors=first, steps=1)
    meet(settings, activate(settings, LoraTensors(), version=0).label, 8)
    plan = Worker(settings, NODE_ID)._next_round()
    assert plan is not None
    changed = make_node(tmp_path / "node", anchors=second, steps=1)
    assert Worker(changed, NODE_ID).step()
    assert RoundStore(settings.data_dir / "learning").last_was_abandoned()
    with sqlite3.connect(settings.data_dir / "learning" / "rounds.db") as rounds:
        (reason,) = rounds.execute("SELECT result FROM rounds").fetchone()
    assert f"was begun with the anchors {str(plan.anchors)[:12]}; now" in reason


def test_anchors_that_cannot_be_used_stop_the_learner_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    anchors = make_tiny_anchors(tmp_path / "anchors", base=tiny_model(seed=1))
    settings = make_node(tmp_path / "node", anchors=anchors, steps=1)
    meet(settings, activate(settings, LoraTensors(), version=0).label, 8)
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert main([]) == 2
    assert "learner: EDGE_LEARNING__ANCHORS: the anchors in " in (said := capsys.readouterr().err)
    assert "Run `edge-node anchors make --out DIR` on this base" in said
    assert not RoundStore(settings.data_dir / "learning").last_was_abandoned()


def test_anchor_environments_are_left_to_the_gate(tmp_path: Path) -> None:
    """One that cannot be loaded does not stop a round: it is not asked."""
    anchors = make_tiny_anchors(tmp_path / "anchors")
    settings = make_node(tmp_path / "node", anchors=anchors, steps=1)
    broken = settings.environments[0].model_copy(update={"factory": "no.such:Thing"})
    settings = settings.model_copy(update={"environments": [broken]})
    meet(settings, activate(settings, LoraTensors(), version=0).label, 8)
    assert Worker(settings, NODE_ID).step()
    assert len(outbox_of(settings).list()) == 1


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 0.5}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("opt", {}),
        ("gpt_neox", {}),
    ],
)
def test_the_head_makes_the_logits_of_every_kind_of_head(
    tmp_path: Path, family: str, config: dict[str, Any]
) -> None:
    path = build_family(family, tmp_path)
    known = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps(known | config))
    base = load_text_model(path)
    states = base_states(base, ROWS[0])
    expected = base(torch.tensor([ROWS[0]])).logits[0]
    torch.testing.assert_close(head_logits(base, states), expected, rtol=1e-4, atol=1e-5)
    expect_base(base, ROWS[0], states.bfloat16(), "They")


def test_states_that_are_not_the_bases_are_refused() -> None:
    base, other = load_text_model(tiny_model()), load_text_model(tiny_model(seed=1))
    states = base_states(base, ROWS[0])
    expect_base(base, ROWS[0], states.bfloat16(), "They")
    with pytest.raises(
        SettingsError, match=r"They do not make the logits of this LlamaForCausalLM"
    ):
        expect_base(base, ROWS[0], base_states(other, ROWS[0]), "They")
    with pytest.raises(
        SettingsError, match=r"differ by inf, relative to its own; expected at most"
    ):
        expect_base(base, ROWS[0], states[:, :8], "They")


def test_a_base_that_makes_its_logits_in_another_way_is_refused() -> None:
    base = load_text_model(tiny_model())
    forward = base.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        made = forward(*args, **kwargs)
        made.logits = 2 * made.logits
        return made

    base.forward = doubled
    with pytest.raises(SettingsError, match=r"makes its logits in a way of its own"):
        expect_base(base, ROWS[0], base_states(base, ROWS[0]), "They")
