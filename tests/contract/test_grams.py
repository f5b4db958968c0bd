"""Sketches of a round's activation statistics against the dense statistics of the same model, and the way they take to the outbox."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from edge_node.learning.batches import Lesson, TokenRow, token_row
from edge_node.learning.grams import sketch_grams
from edge_node.learning.records import RoundStore
from edge_node.learning.round import release_directory, train_on_experience
from edge_node.learning.worker import Worker
from edge_node.outbox import Outbox
from protos.lora import LoraModule, LoraTensors, decode, encode
from protos.manifest import UpdateManifest
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, make_node, meet
from tests.fakes.tiny_model import answer_ids, prompt_ids, tiny_adapter, tiny_model, write_peft


def make_rows(count: int) -> list[TokenRow]:
    lessons = [
        Lesson(prompt_ids(f"w{i} w{3 * i + 1} w{7}"), answer_ids(f"w{200 + i} w{i + 3} w9")) for i in range(count)
    ]
    return [token_row(lesson) for lesson in lessons]


def trained(update: LoraTensors, folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(write_peft(update, folder)), is_trainable=True)


def dense_grams(update: LoraTensors, rows: list[TokenRow]) -> dict[str, np.ndarray]:
    """G / mean diagonal, float64 [in, in], from a plain model with half of the increment in its weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in update.modules}
    for name, module in update.modules.items():
        layer = model.get_submodule(name)
        layer.weight.data += 0.5 * module.scale * torch.from_numpy(module.B @ module.A)

        def keep(layer: Any, inputs: Any, output: torch.Tensor, name: str = name) -> None:
            output.retain_grad()
            seen[name].append((inputs[0].detach(), output))

        layer.register_forward_hook(keep)
    for row in rows:
        mean = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
        (mean * sum(label >= 0 for label in row.labels)).backward()
    grams = {}
    for name, tokens in seen.items():
        x = torch.cat([x[0] for x, _ in tokens]).double()
        g = torch.cat([output.grad[0] for _, output in tokens]).double()  # type: ignore[index]
        gram = (x.T @ (g.square().sum(1, keepdim=True) * x)).numpy()
        grams[name] = gram / np.mean(np.diag(gram))
    return grams


def test_sketches_keep_trace_and_leading_directions(tmp_path: Path) -> None:
    update, rows = tiny_adapter(1, rank=4, strength=0.3), make_rows(12)
    model = trained(update, tmp_path)
    before = model(torch.tensor([rows[0].input_ids])).logits.detach()
    sections = sketch_grams(model, rows, rank=8, seed=5)
    assert set(sections) == {f"gram/{name}" for name in update.modules}
    ends = 0.0
    for name, gram in dense_grams(update, rows).items():
        U, c = sections[f"gram/{name}"]["U"], sections[f"gram/{name}"]["c"]
        assert (U.dtype, U.shape, c.dtype, c.shape) == (np.float32, (gram.shape[0], 8), np.float32, ())
        sketch = float(c) * np.eye(len(gram)) + U.astype(np.float64) @ U.T
        assert np.trace(sketch) == pytest.approx(np.trace(gram), rel=1e-4)
        values = np.linalg.eigvalsh(gram)[::-1]
        best = np.linalg.norm(np.concatenate([np.zeros(8), values[8:] - values[8:].mean()]))
        assert np.linalg.norm(gram - sketch) <= 1.5 * best + 1e-3 * np.linalg.norm(gram), name
        ends = max(ends, best / np.linalg.norm(gram))
    assert ends < 0.9, "so much is left out that the bound says nothing"
    assert torch.equal(model(torch.tensor([rows[0].input_ids])).logits, before), "the half point is left again"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_whole_rank_is_the_whole_gram_and_the_point_is_half_way(tmp_path: Path) -> None:
    update, rows = tiny_adapter(2, rank=4, strength=0.3), make_rows(3)
    name = "model.layers.0.self_attn.v_proj"
    section = sketch_grams(trained(update, tmp_path / "a"), rows, rank=64, seed=1)[f"gram/{name}"]
    sketch = float(section["c"]) * np.eye(64) + section["U"].astype(np.float64) @ section["U"].T
    np.testing.assert_allclose(sketch, dense_grams(update, rows)[name], atol=1e-4 * np.abs(sketch).max())
    whole = LoraTensors({n: LoraModule(m.A, m.B, 2 * m.scale) for n, m in update.modules.items()})
    assert np.abs(sketch - dense_grams(whole, rows)[name]).max() > 1e-2 * np.abs(sketch).max()
    assert sketch_grams(trained(update, tmp_path / "b"), [], rank=4, seed=1) == {}


@pytest.mark.parametrize(("permitted", "asked", "rank"), [(4, 16, 4), (16, 3, 3), (0, 16, 0), (8, 0, 0)])
def test_a_node_sends_what_central_asks_for_and_its_settings_permit(
    permitted: int, asked: int, rank: int, tmp_path: Path
) -> None:
    settings = make_node(tmp_path / "node", steps=2, gram_rank=permitted)
    (settings.data_dir / "releases").mkdir(exist_ok=True)
    offer = {"offer_id": "o", "max_rank": 8, "gram_rank": asked}
    (settings.data_dir / "releases" / "offer.json").write_text(json.dumps(offer))
    release = activate(settings, tiny_adapter(3, rank=4, strength=0.3), version=1)
    meet(settings, release.label, 6)
    assert Worker(settings, NODE_ID).step()
    outbox = Outbox(settings.data_dir / "outbox", "auto")
    (entry,) = outbox.list()
    payload = outbox.payload_path(entry.round_id).read_bytes()
    manifest, update = UpdateManifest.from_bytes(outbox.signed(entry.update_id)[0]), decode(payload)
    assert manifest.sections == sorted(update.sections) == sorted(f"gram/{n}" for n in update.modules if rank)
    sections: Mapping[str, Any] = update.sections
    assert {section["U"].shape[1] for section in sections.values()} == ({rank} if rank else set())
    if rank == 3:
        plan = RoundStore(settings.data_dir / "learning").last()
        assert plan is not None
        folder = release_directory(settings.data_dir, plan.release_id)
        again = train_on_experience(plan, settings, folder, tmp_path / "again")
        assert encode(again.tensors) == payload, "the same round must give the same bytes"


def test_no_sketches_unless_central_asks(tmp_path: Path) -> None:
    settings = make_node(tmp_path, steps=1, gram_rank=4)
    meet(settings, activate(settings, LoraTensors(), version=0).label, 6)
    plan = Worker(settings, NODE_ID)._next_round()
    assert plan is not None
    assert plan.gram_rank == 0
