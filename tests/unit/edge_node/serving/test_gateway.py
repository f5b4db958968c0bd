from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import pytest

from edge_node.errors import NotHeld, ServingError
from edge_node.serving.gateway import Gateway
from edge_node.settings import ReleasesSettings
from tests.fakes.gateway import make_gateway, make_version

V1, V2 = "lorikeet@v1-aaaaaaaa", "lorikeet@v2-bbbbbbbb"


@pytest.fixture
async def gateway(tmp_path: Path) -> Gateway:
    gateway = make_gateway(tmp_path)
    await gateway.load(V1, make_version(tmp_path, "v1"))
    await gateway.load(V2, make_version(tmp_path, "v2"))
    return gateway


async def test_it_is_ready_once_the_alias_points_somewhere(gateway: Gateway) -> None:
    assert gateway.not_ready() == "No release is active yet."
    gateway.point(V1)
    assert gateway.not_ready() is None
    assert gateway.aliases.resolve("lorikeet") == gateway.aliases.resolve(None) == V1
    gateway.point(V2)
    assert gateway.aliases.resolve("lorikeet") == V2
    assert gateway.aliases.resolve(V1) == V1


async def test_loading_again_changes_nothing_and_other_bytes_are_refused(
    gateway: Gateway, tmp_path: Path
) -> None:
    await gateway.load(V1, tmp_path / "v1")
    with pytest.raises(ServingError, match="never replaced in place"):
        await gateway.load(V1, make_version(tmp_path, "other"))
    assert gateway.aliases.loaded[V1] == tmp_path / "v1"


@pytest.mark.parametrize("name", ["v1", "other@v1", "lorikeet@", "base@01234567"])
async def test_a_version_is_named_after_the_alias(
    gateway: Gateway, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ServingError, match="lorikeet@<label>"):
        await gateway.load(name, tmp_path / "v1")


async def test_a_directory_that_is_none_is_named(gateway: Gateway, tmp_path: Path) -> None:
    with pytest.raises(
        ServingError, match=r"adapter_config\.json, adapter_model\.safetensors not found"
    ):
        await gateway.load("lorikeet@v3", tmp_path / "absent")
    with pytest.raises(ServingError, match="not loaded"):
        gateway.point("lorikeet@v3")


async def test_an_adapter_that_does_not_fit_the_base_is_refused(
    gateway: Gateway, tmp_path: Path
) -> None:
    with pytest.raises(ServingError, match=r"shape \[2, 5\]; expected \[rank, 4\]"):
        await gateway.load("lorikeet@v3", make_version(tmp_path, "narrow", columns=5))
    with pytest.raises(ServingError, match=r"layers.7.* no module of the base"):
        await gateway.load(
            "lorikeet@v3", make_version(tmp_path, "deep", module="model.layers.7.self_attn.q_proj")
        )
    broken = make_version(tmp_path, "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"xxx")
    with pytest.raises(ServingError, match="not a readable safetensors file"):
        await gateway.load("lorikeet@v3", broken)


async def test_what_the_engine_refuses_is_not_loaded(gateway: Gateway, tmp_path: Path) -> None:
    gateway.engine.refuse = "rank 100"  # type: ignore[attr-defined]
    with pytest.raises(ServingError, match="rank 100"):
        await gateway.load("lorikeet@v3", make_version(tmp_path, "v3"))
    assert "lorikeet@v3" not in gateway.aliases.loaded


async def test_the_target_of_the_alias_is_not_unloaded(gateway: Gateway) -> None:
    gateway.point(V1)
    with pytest.raises(ServingError, match="points at"):
        await gateway.unload(V1)
    await gateway.unload(V2)
    await gateway.unload(V2)
    assert set(gateway.aliases.loaded) == {V1}
    assert set(gateway.engine.loaded) == {V1}  # type: ignore[attr-defined]


async def test_unloading_waits_for_requests_in_flight(gateway: Gateway) -> None:
    gateway.point(V1)
    gateway.aliases.enter(V2)
    unloading = asyncio.create_task(gateway.unload(V2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not unloading.done()
    assert gateway.aliases.retiring(V2)
    assert V2 in gateway.engine.loaded  # type: ignore[attr-defined]
    gateway.aliases.leave(V2)
    await unloading
    assert V2 not in gateway.engine.loaded  # type: ignore[attr-defined]


async def test_a_long_answer_on_an_old_version_does_not_hold_up_a_new_one(
    gateway: Gateway, tmp_path: Path
) -> None:
    gateway.point(V1)
    gateway.aliases.enter(V2)
    unloading = asyncio.create_task(gateway.unload(V2))
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await gateway.load("lorikeet@v3-cccccccc", make_version(tmp_path, "v3"))
    with pytest.raises(
        ServingError, match="1 requests are still on it"
    ):  # not "gone": its directory is in use
        await gateway.unload(V2)
    gateway.aliases.leave(V2)
    await unloading


async def test_an_unload_that_is_cancelled_leaves_the_version_usable(gateway: Gateway) -> None:
    gateway.aliases.enter(V2)
    unloading = asyncio.create_task(gateway.unload(V2))
    await asyncio.sleep(0)
    unloading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await unloading
    assert V2 in gateway.aliases.loaded


async def test_draining_waits_and_refuses(gateway: Gateway) -> None:
    gateway.point(V1)
    gateway.aliases.enter(V1)
    draining = asyncio.create_task(gateway.drain())
    await asyncio.sleep(0)
    assert gateway.not_ready() == "The node is draining."
    assert not draining.done()
    gateway.aliases.leave(V1)
    await draining


async def test_a_start_takes_up_the_active_release(tmp_path: Path) -> None:
    gateway = make_gateway(tmp_path)
    await gateway.activate()
    assert gateway.not_ready() == "No release is active yet."
    make_version(tmp_path, "v1")
    (tmp_path / "releases").mkdir()
    active = {"release_id": "aa", "label": "v1-aaaaaaaa", "path": str(tmp_path / "v1")}
    (tmp_path / "releases" / "active.json").write_text(json.dumps(active))
    await gateway.activate()
    assert gateway.aliases.target == V1


async def test_an_active_release_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    gateway = make_gateway(tmp_path)
    (tmp_path / "releases").mkdir()
    (tmp_path / "releases" / "active.json").write_text('{"label": "v1", "path": "absent"}')
    await gateway.activate()
    assert "not a PEFT directory" in (gateway.not_ready() or "")


async def test_a_probe_that_waits_behind_others_is_no_hang(gateway: Gateway) -> None:
    async def stuck() -> None:
        await asyncio.Event().wait()

    assert await gateway.probe(1)
    gateway.engine.probe = stuck  # type: ignore[method-assign]
    assert not await gateway.probe(0.01)
    gateway.last_progress += 3600
    assert await gateway.probe(0.01)


async def test_a_version_is_hidden_until_its_workers_hold_it(
    gateway: Gateway, tmp_path: Path
) -> None:
    name = "lorikeet@v3-cccccccc"
    await gateway.load(name, make_version(tmp_path, "v3"), proved=False)
    with pytest.raises(ServingError, match="not loaded"):
        gateway.point(name)
    gateway.engine.wrong = {"model.layers.0.mlp.up_proj": "other values"}  # type: ignore[attr-defined]
    with pytest.raises(NotHeld, match=r"1 of its 1 modules .*up_proj: other values"):
        await gateway.expect_held(name)
    assert name not in gateway.aliases.public
    gateway.engine.wrong = {}  # type: ignore[attr-defined]
    await gateway.expect_held(name)
    gateway.point(name)
    assert gateway.aliases.target == name
    with pytest.raises(ServingError, match="nothing of it can be compared"):
        await gateway.expect_held("lorikeet@v9")


async def test_a_start_leaves_pointing_to_a_supervisor_that_proves(tmp_path: Path) -> None:
    gateway = make_gateway(tmp_path)
    make_version(tmp_path, "v1")
    (tmp_path / "releases" / "proofs").mkdir(parents=True)
    active = {"release_id": "aa", "label": "v1-aaaaaaaa", "path": str(tmp_path / "v1")}
    (tmp_path / "releases" / "active.json").write_text(json.dumps(active))
    await gateway.activate()
    assert "compared before it serves" in (gateway.not_ready() or "")
    assert (list(gateway.aliases.loaded), gateway.aliases.public) == ([V1], [])
    await gateway.expect_held(V1)
    gateway.point(V1)
    assert gateway.not_ready() is None


async def test_a_start_without_proof_points_by_itself(tmp_path: Path) -> None:
    gateway = make_gateway(tmp_path)
    gateway.settings = gateway.settings.model_copy(
        update={"releases": ReleasesSettings(proof="off")}
    )
    make_version(tmp_path, "v1")
    (tmp_path / "releases" / "proofs").mkdir(parents=True)
    active = {"release_id": "aa", "label": "v1-aaaaaaaa", "path": str(tmp_path / "v1")}
    (tmp_path / "releases" / "active.json").write_text(json.dumps(active))
    await gateway.activate()
    assert gateway.aliases.target == V1


async def test_each_version_has_the_digest_of_its_weights(gateway: Gateway, tmp_path: Path) -> None:
    file = (tmp_path / "v1" / "adapter_model.safetensors").read_bytes()
    assert gateway.weights[V1] == hashlib.sha256(file).hexdigest()
    await gateway.unload(V1)
    assert V1 not in gateway.weights
