"""Bounds on an update's own words grow with the base, hold what a real round sends, and little more."""

from __future__ import annotations

import numpy as np
import pytest

from central.errors import Reason, Refused
from central.intake.bounds import Allowance, header_bytes, manifest_bytes
from protos.lora import LoraModule, LoraTensors, encode
from tests.unit.central import builders as make

MODULES = [f"model.layers.{layer}.{name}" for layer in range(32) for name in ("self_attn.q_proj", "mlp.down_proj")]


def test_a_header_with_every_module_and_section_fits() -> None:
    a, b = np.zeros((64, 4), np.float32), np.zeros((4, 64), np.float32)
    modules = {name: LoraModule(a, b, 0.12345678901234567) for name in MODULES}
    sections = {f"gram/{name}": {"U": b, "c": np.zeros((), np.float32)} for name in MODULES}
    data = encode(LoraTensors(modules, sections))
    size = int.from_bytes(data[:8], "little")
    # A payload of 512 MiB has offsets of nine digits, not six: six more for each of five entries.
    assert size + 6 * 5 * len(MODULES) < header_bytes(MODULES) < 2 * size


def test_a_manifest_with_every_section_fits() -> None:
    metrics = {f"metric/{number}": 0.12345678901234567 for number in range(64)}
    sections = sorted(f"gram/{name}" for name in MODULES)
    update = make.make_update(make.make_release(), metrics=metrics, sections=sections)
    assert len(update.to_bytes()) < manifest_bytes(MODULES) < 4 * len(update.to_bytes())


def test_bounds_are_small_for_a_small_base() -> None:
    assert header_bytes(MODULES[:2]) < 8 << 10
    assert manifest_bytes(MODULES[:2]) < 9 << 10


def test_a_node_may_have_so_many_updates_in_an_hour() -> None:
    now = [1e6]
    allowance = Allowance(4, lambda: now[0])
    for _ in range(4):
        allowance.expect_one("a")
        allowance.take_one("a")
    with pytest.raises(Refused, match=r"had 4 updates .* Try again in 900 s") as caught:
        allowance.expect_one("a")
    assert caught.value.reason == Reason.TOO_MANY_UPDATES
    allowance.expect_one("b")
    now[0] += 900
    allowance.expect_one("a")
    allowance.take_one("a")
    now[0] += 899
    with pytest.raises(Refused):
        allowance.expect_one("a")
    now[0] += 3600
    for _ in range(4):
        allowance.expect_one("a")
        allowance.take_one("a")
