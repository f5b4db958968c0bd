"""A node's data directory as enrolment, the watcher and capture leave it, without central or vLLM.

In: a directory. Out: settings for it, with an identity, an active release and experience. Keys are
real, so signatures are too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_node.experience import ExperienceStore, Feedback, Interaction
from edge_node.releases.peft_directory import peft_files
from edge_node.settings import EdgeSettings
from protos.base import read_base_model
from protos.lora import LoraTensors, encode
from protos.manifest import Payload, ReleaseManifest, sha256_hex
from tests.fakes.identity import make_identity
from tests.fakes.tiny_model import POSITIONS, answer_ids, prompt_ids, tiny_model

ANCHOR = {"name": "words", "factory": "tests.fakes.word_environment:NextWord", "anchor": True}


def make_node(data_dir: Path, **learning: Any) -> EdgeSettings:
    """An enrolled node on the tiny model with a NextWord anchor; `learning` overrides settings."""
    base = tiny_model()
    make_identity(data_dir, read_base_model(base).digest)
    defaults: dict[str, Any] = {
        "min_examples": 4,
        "min_new_failures": 2,
        "batch_own": 3,
        "batch_hard": 0,
        "batch_anchor": 2,
        "poll_s": 0.05,
        "supersede_after_s": 0,
        "gate": {"tasks": 0},  # no vLLM here
    }
    return EdgeSettings.model_validate(
        {
            "data_dir": data_dir,
            "base": {"path": base},
            "environments": [ANCHOR],
            "learning": defaults | learning,
        }
    )


def as_environment(settings: EdgeSettings) -> dict[str, str]:
    """The same settings as EDGE_* variables for a process of its own."""
    document: Mapping[str, Any] = settings.model_dump(mode="json")
    variables = {"EDGE_DATA_DIR": document["data_dir"], "EDGE_BASE__PATH": document["base"]["path"]}
    variables["EDGE_ENVIRONMENTS"] = json.dumps(document["environments"])
    return variables | {
        f"EDGE_LEARNING__{key.upper()}": json.dumps(value)
        if isinstance(value, list | dict)
        else str(value)
        for key, value in document["learning"].items()
        if value is not None
    }


def activate(settings: EdgeSettings, tensors: LoraTensors, version: int) -> ReleaseManifest:
    """Make `tensors` the active release."""
    payload = encode(tensors)
    manifest = ReleaseManifest(
        base=json.loads((settings.data_dir / "identity/identity.json").read_text())["base"],
        cohort="shared",
        version=version,
        parent=None if version == 0 else "a" * 64,
        plan=None if version == 0 else "b" * 64,
        payload=Payload(digest_sha256=sha256_hex(payload), size_bytes=len(payload)),
        rank=tensors.rank,
        truncation_error=0.0,
        updates=[],
        created_at="2026-11-22T00:00:00Z",
    )
    folder = settings.data_dir / "releases/versions" / manifest.digest
    folder.mkdir(parents=True, exist_ok=True)
    shapes = read_base_model(settings.base.path or tiny_model()).module_shapes
    for name, content in peft_files(tensors, shapes).items():
        (folder / name).write_bytes(content)
    (folder / "payload.safetensors").write_bytes(payload)
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    active = {"release_id": manifest.digest, "label": manifest.label, "path": str(folder)}
    (settings.data_dir / "releases/active.json").write_text(json.dumps(active))
    return manifest


def meet(settings: EdgeSettings, label: str, count: int, *, first: int = 0) -> None:
    """`count` wrong answers by that version, each corrected."""
    store = ExperienceStore(settings.data_dir / "experience.db")
    for number in range(first, first + count):
        question, right = (
            f"w{number} w{number + 1} w{number + 2}",
            f"w{200 + number % 20} w{number + 3}",
        )
        interaction = Interaction(
            id=f"chat-{number}",
            created_at="2026-11-22T00:00:00Z",
            model=f"{settings.serving.alias}@{label}",
            messages=[{"role": "user", "content": question}],
            answer="w0",
            finish_reason="stop",
            endpoint="/v1/chat/completions",
            prompt_ids=prompt_ids(question),
            answer_ids=answer_ids("w0"),
        )
        store.add_interactions([interaction])
        feedback = Feedback(
            interaction.id, score=0.0, correction=right, correction_ids=answer_ids(right)
        )
        store.add_feedback(feedback, max_tokens=POSITIONS)
    store.close()
