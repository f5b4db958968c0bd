from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_node.errors import StorageError
from edge_node.learning.worker import read_active, read_encoding, read_max_rank


def test_worker_module_loads_no_training_library() -> None:
    heavy = {"torch", "transformers", "trl", "vllm", "flwr"}
    code = f"import edge_node.learning.worker, sys; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_no_active_release_yet(tmp_path: Path) -> None:
    assert read_active(tmp_path) is None


def test_damaged_active_release_is_named(tmp_path: Path) -> None:
    (tmp_path / "releases").mkdir()
    (tmp_path / "releases/active.json").write_text("{")
    with pytest.raises(StorageError, match=r"active\.json cannot be read"):
        read_active(tmp_path)


@pytest.mark.parametrize(
    ("content", "rank"), [('{"offer_id": "x", "max_rank": 4}', 4), ("{", None), (None, None)]
)
def test_offer(tmp_path: Path, content: str | None, rank: int | None) -> None:
    (tmp_path / "releases").mkdir()
    if content is not None:
        (tmp_path / "releases/offer.json").write_text(content)
    assert read_max_rank(tmp_path) == rank


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ('{"max_rank": 4, "encodings": ["float32", "bf16"]}', "bf16"),
        ('{"max_rank": 4, "encodings": ["float32", "int8"]}', "float32"),
        ('{"max_rank": 4, "encodings": []}', "float32"),
        ('{"max_rank": 4}', "float32"),  # as an older node kept it
        ("{", "float32"),
        (None, "float32"),
    ],
)
def test_an_update_travels_as_central_offers_it(
    tmp_path: Path, content: str | None, encoding: str
) -> None:
    (tmp_path / "releases").mkdir()
    if content is not None:
        (tmp_path / "releases/offer.json").write_text(content)
    assert read_encoding(tmp_path, "bf16") == encoding
