"""TRL reads what `edge-node experience export` writes: its types, and its chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_node.experience import ExperienceStore, Feedback
from edge_node.experience.selection import Selection
from edge_node.experience_export import Export, Format
from edge_node.rendering import load_renderer
from tests.fakes.chat_templates import make_base
from tests.unit.edge_node.test_experience_cli import make, store

__all__ = ["store"]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize("form", [Format.sft, Format.kto, Format.dpo])
def test_trl_takes_an_export_as_a_conversational_data_set(
    store: ExperienceStore, tmp_path: Path, form: Format
) -> None:
    from datasets import load_dataset
    from trl.data_utils import apply_chat_template, is_conversational

    history: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi."}]},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Rain?", "name": "ann"},
    ]
    store.add_interactions([make(8, messages=history)])
    store.give(Feedback("chatcmpl-8", 1.0), max_tokens=99)
    renderer = load_renderer(make_base(tmp_path / "base", "qwen3"))
    file = tmp_path / "lines.jsonl"
    lines = list(Export(store, renderer.answer_text).lines(form, Selection()))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cache = str(tmp_path / "cache")
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=cache)
    assert len(rows) == len(lines) > 0
    answers = {"sft": {"completion"}, "kto": {"completion"}, "dpo": {"chosen", "rejected"}}[form]
    for row in rows:
        assert is_conversational(row)
        made = apply_chat_template(row, renderer.tokenizer)
        assert made["prompt"].endswith("<|im_start|>assistant\n")
        assert all(made[name].endswith("<|im_end|>\n") for name in answers)
    if form is Format.kto:
        assert {row["label"] for row in rows} == {True, False}
