"""The node's own adapter is served on the release that it is built on, and is gone with it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import load_file

from edge_node.errors import NotHeld, ServingError
from edge_node.learning import own as learning_own
from edge_node.learning.own import keep_own
from edge_node.problems import Problems
from edge_node.releases.own import Own, own_folder, read_own, write_own
from edge_node.releases.store import ReleaseStore
from edge_node.releases_settings import ReleasesSettings
from edge_node.settings import EdgeSettings
from protos.lora import LoraModule, LoraTensors
from tests.contract.release_watcher.stand_ins import (
    Connect,
    Control,
    Vllm,
    trouble,
    until,
    watching,
)
from tests.contract.release_watcher.test_canary_in_node import Naming, releases
from tests.fakes.signed_releases import SHAPES

SETTINGS = ReleasesSettings(serve_keys={"desk": "best"}, crashes=2)
GAIN = {"held_out_tasks": 32.0, "held_out_start": 0.25, "held_out_policy": 0.5}


class OwnControl(Control):
    """Like vLLM's alias table, it forgets the own adapter when the alias moves."""

    answers: str | None = None

    async def own(self, name: str | None) -> None:
        self.calls.append(("own", name or ""))
        self.answers = name

    async def state(self) -> Any:
        return SimpleNamespace(own=self.answers)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("watcher", "own"):
        monkeypatch.setattr(f"edge_node.releases.{module}.LOOK_PERIOD_S", 0.02)
    monkeypatch.setattr(Vllm, "generation", 1)


def increment(rank: int = 2) -> LoraTensors:
    rng = np.random.default_rng(7)
    return LoraTensors(
        {
            name: LoraModule(
                rng.normal(size=(rank, columns)).astype(np.float32),
                rng.normal(size=(rows, rank)).astype(np.float32),
                scale=0.5,
            )
            for name, (rows, columns) in SHAPES.items()
        }
    )


def keep(
    data_dir: Path, store: ReleaseStore, release_id: str, round_id: str, **changes: Any
) -> None:
    settings = EdgeSettings.model_validate(
        {"data_dir": data_dir, "releases": SETTINGS} | changes.pop("settings", {})
    )
    plan: Any = SimpleNamespace(round_id=round_id, release_id=release_id)
    stored = store.get(release_id)
    assert stored is not None
    tensors = changes.pop("tensors", increment())
    keep_own(settings, plan, stored.path, tensors, GAIN | changes)


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_own, "read_base", lambda _: SimpleNamespace(module_shapes=SHAPES))


async def test_it_is_served_on_its_start_and_gone_with_it(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, tmp_path: Path
) -> None:
    payload, heads, names = releases(store, key, 2)
    stored = [store.install(signed, payload) for signed in heads]
    store.activate(stored[0])
    central, control = Naming(payload), OwnControl()
    async with watching(store, await connect(central), control, releases=SETTINGS):
        await until(lambda: ("point", names[0]) in control.calls)
        keep(tmp_path, store, stored[0].release_id, "r1")
        await until(lambda: control.calls[-1] == ("own", "lorikeet@own-r1"))
        assert control.calls[-2] == ("load", "lorikeet@own-r1")
        # A later round's takes its place, and vLLM forgets the first.
        keep(tmp_path, store, stored[0].release_id, "r2")
        await until(lambda: control.calls[-1] == ("unload", "lorikeet@own-r1"))
        assert control.calls[-2] == ("own", "lorikeet@own-r2")
        # vLLM is started anew.
        control.calls.clear()
        Vllm.generation = 2
        await until(lambda: ("own", "lorikeet@own-r2") in control.calls)
        for folder in own_folder(tmp_path).glob("*/"):
            os.utime(folder, (0, 0))
        await central.name("stable", heads[1])
        await until(lambda: control.calls[-1] == ("unload", "lorikeet@own-r2"))
        assert control.calls[-2] == ("own", "")
        await until(lambda: not (own_folder(tmp_path) / "r1").exists())
    assert trouble(store) == {}


async def test_it_answers_again_when_the_alias_moved_away_and_back(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, tmp_path: Path
) -> None:
    """In less time than the node takes to look."""
    payload, heads, _ = releases(store, key, 1)
    stored = store.install(heads[0], payload)
    store.activate(stored)
    keep(tmp_path, store, stored.release_id, "r1")
    control = OwnControl()
    async with watching(store, await connect(Naming(payload)), control, releases=SETTINGS):
        await until(lambda: ("own", "lorikeet@own-r1") in control.calls)
        control.calls.clear()
        control.answers = None
        await until(lambda: ("own", "lorikeet@own-r1") in control.calls)
        await asyncio.sleep(0.1)
        assert ("unload", "lorikeet@own-r1") not in control.calls
    assert trouble(store) == {}


async def test_one_that_ends_vllm_is_left(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, tmp_path: Path
) -> None:
    payload, heads, names = releases(store, key, 1)
    stored = store.install(heads[0], payload)
    store.activate(stored)
    keep(tmp_path, store, stored.release_id, "r1")
    control = OwnControl()
    async with watching(store, await connect(Naming(payload)), control, releases=SETTINGS):
        for generation in (2, 3):
            await until(lambda: ("own", "lorikeet@own-r1") in control.calls)
            control.calls.clear()
            Vllm.generation = generation
        await until(lambda: "own-adapter" in trouble(store))
        assert "vLLM ended 2 times" in trouble(store)["own-adapter"].text
        await asyncio.sleep(0.1)
        assert ("load", "lorikeet@own-r1") not in control.calls
        assert ("point", names[0]) in control.calls


async def test_one_that_ends_vllm_while_it_is_loaded_is_left(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, tmp_path: Path
) -> None:
    payload, heads, _ = releases(store, key, 1)
    stored = store.install(heads[0], payload)
    store.activate(stored)
    keep(tmp_path, store, stored.release_id, "r1")

    class Ending(OwnControl):
        async def load(self, name: str, path: Path, *, proved: bool = True) -> None:
            await super().load(name, path, proved=proved)
            if "own" in name:
                Vllm.generation += 1
                raise ServingError("vLLM does not answer.")

    control = Ending()
    async with watching(store, await connect(Naming(payload)), control, releases=SETTINGS):
        await until(lambda: "vLLM ended 2 times" in str(trouble(store).get("own-adapter")))
        control.calls.clear()
        await asyncio.sleep(0.2)
        assert control.calls == []


async def test_one_that_vllms_workers_do_not_hold_answers_nobody(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, tmp_path: Path
) -> None:
    payload, heads, _ = releases(store, key, 1)
    stored = store.install(heads[0], payload)
    store.activate(stored)
    keep(tmp_path, store, stored.release_id, "r1")

    class Wrong(OwnControl):
        hidden = True

        async def load(self, name: str, path: Path, *, proved: bool = True) -> None:
            await super().load(name, path, proved=proved)
            self.hidden = not proved

        async def expect_held(self, name: str) -> None:
            raise NotHeld("1 of its 1 modules is not held")

    control = Wrong()
    async with watching(store, await connect(Naming(payload)), control, releases=SETTINGS):
        await until(lambda: ("unload", "lorikeet@own-r1") in control.calls)
        await until(lambda: "is not held" in str(trouble(store).get("own-adapter")))
    assert control.hidden
    assert ("own", "lorikeet@own-r1") not in control.calls


async def test_without_a_policy_for_it_nothing_is_served(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, tmp_path: Path
) -> None:
    payload, heads, names = releases(store, key, 1)
    stored = store.install(heads[0], payload)
    store.activate(stored)
    keep(tmp_path, store, stored.release_id, "r1")
    control = OwnControl()
    async with watching(store, await connect(Naming(payload)), control):
        await until(lambda: ("point", names[0]) in control.calls)
        await asyncio.sleep(0.1)
    assert not any(call == "own" for call, _ in control.calls)


def test_what_is_kept_is_the_exact_sum_of_release_and_increment(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, tmp_path: Path
) -> None:
    payload, heads, _ = releases(store, key, 1)
    stored, added = store.install(heads[0], payload), increment()
    keep(tmp_path, store, stored.release_id, "r1")
    own = read_own(tmp_path)
    assert own is not None
    assert (own.start, own.policy, own.start_release) == (0.25, 0.5, stored.release_id)

    def product(folder: Path, name: str) -> np.ndarray:
        arrays = load_file(folder / "adapter_model.safetensors")
        prefix = f"base_model.model.{name}"
        return arrays[f"{prefix}.lora_B.weight"] @ arrays[f"{prefix}.lora_A.weight"]

    for name, module in added.modules.items():
        expected = product(stored.path, name) + 0.5 * module.B @ module.A
        np.testing.assert_allclose(product(own.path, name), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"held_out_policy": 0.25},
        {"held_out_policy": 0.1},
        {"held_out_start": None, "held_out_policy": None},  # a round without a local gate
        {"settings": {"releases": ReleasesSettings()}},
    ],
)
def test_what_is_no_better_or_unwanted_is_not_kept(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, tmp_path: Path, changes: dict[str, Any]
) -> None:
    payload, heads, _ = releases(store, key, 1)
    stored = store.install(heads[0], payload)
    keep(tmp_path, store, stored.release_id, "r1", **changes)
    assert read_own(tmp_path) is None
    assert not own_folder(tmp_path).exists()


def test_a_rank_that_vllm_refuses_is_said_and_costs_no_round(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, tmp_path: Path
) -> None:
    payload, heads, _ = releases(store, key, 1)
    stored = store.install(heads[0], payload)
    keep(tmp_path, store, stored.release_id, "r1", tensors=increment(rank=64))
    assert read_own(tmp_path) is None
    [problem] = Problems(tmp_path).current()
    assert problem.room == "own-adapter"
    assert "rank 67 together; this node serves adapters up to rank 64" in problem.text


def test_whatever_fails_costs_no_round(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("it may quote anything")

    payload, heads, _ = releases(store, key, 1)
    stored = store.install(heads[0], payload)
    monkeypatch.setattr(learning_own, "side_by_side", fails)
    keep(tmp_path, store, stored.release_id, "r1")
    [problem] = Problems(tmp_path).current()
    assert problem.text == "The adapter of round r1 is not kept on this node: ValueError"


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"round_id": 1}', b"\xff"])
def test_a_damaged_record_counts_as_none(tmp_path: Path, damage: bytes) -> None:
    own = Own(round_id="r", start_release="x", path=tmp_path, tasks=1.0, start=0.0, policy=1.0)
    write_own(tmp_path, own)
    assert read_own(tmp_path) == own
    (own_folder(tmp_path) / "own.json").write_bytes(damage)
    assert read_own(tmp_path) is None
