from __future__ import annotations

import pytest

from edge_node.errors import SettingsError
from edge_node.learning import compute
from edge_node.learning.compute import choose_device, cuda_bytes, read_compute, training_dtype
from edge_node.settings import LearningSettings


@pytest.mark.parametrize(
    ("setting", "seen", "expected"),
    [("auto", 1 << 30, "cuda"), ("auto", 0, "cpu"), ("cpu", 1 << 30, "cpu"), ("cuda", 1, "cuda")],
)
def test_auto_takes_a_gpu_where_torch_sees_one(setting: str, seen: int, expected: str) -> None:
    assert choose_device(setting, lambda: seen) == expected


def test_a_gpu_that_is_not_there_is_told_with_the_next_step() -> None:
    with pytest.raises(SettingsError, match=r"DEVICE is 'cuda'.*sees no CUDA.*CUDA_VISIBLE"):
        choose_device("cuda", lambda: False)


def test_the_settings_say_how_this_machine_trains() -> None:
    settings = LearningSettings(device="cpu", gradient_checkpointing=True, batch_tokens=64)
    assert read_compute(settings) == compute.Compute("cpu", True, 64)


def test_a_torch_for_cpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "version", lambda name: "2.13.0+cpu")
    monkeypatch.delattr("subprocess.run")
    assert cuda_bytes() == 0


@pytest.mark.parametrize(("said", "expected"), [("85000000000", 85 * 10**9), ("0", 0), ("x", 0)])
def test_a_torch_for_gpus_is_asked_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, said: str, expected: int
) -> None:
    monkeypatch.setattr(compute, "version", lambda name: "2.13.0+cu130")
    monkeypatch.setattr(compute, "_ASK", f"print({said!r})")
    assert cuda_bytes() == expected


@pytest.mark.parametrize(
    ("setting", "parameters", "expected"),
    [
        ("auto", 49_999_999, "float32"),
        ("auto", 50_000_000, "bfloat16"),
        ("float32", 10**10, "float32"),
        ("bfloat16", 10, "bfloat16"),
    ],
)
def test_auto_is_bfloat16_for_large_models(setting: str, parameters: int, expected: str) -> None:
    assert training_dtype(setting, parameters) == expected
