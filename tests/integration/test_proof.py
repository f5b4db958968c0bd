"""Silent failures, seeded one after the other into a real engine: the node finds each of them.

One vLLM and one PEFT process for all. A fault is found twice: by what the workers hold, before the
version has a name for clients, and by what vLLM answers, had the first comparison not been there.
"""

from __future__ import annotations

import shutil
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from edge_node.errors import NotProved
from edge_node.proof.proof import Proof
from edge_node.releases.store import StoredRelease
from protos.base import read_base_model
from protos.lora import LoraTensors
from tests.fakes.tiny_model import tiny_adapter, tiny_model
from tests.integration.proving_node import ProvingNode, proving_node
from tests.integration.serving_node import COMPLETIONS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(540)]

ADAPTER = "adapter_model.safetensors"
IN_THE_WORKER = {
    "not_delivered": "its worker has no adapter",
    "no_op": "copy in memory has other values",
    "scaled": "copy in memory has other values",
    "zeroed": "copy in memory has other values",
    "prefix": "vLLM holds no values for it",
    "disjoint": "vLLM holds no values for it",
    "swapped": "copy in memory has other values",
}
"""What the engine does to an adapter, and how the node calls it."""
IN_THE_ANSWERS = {
    "no_op": "it answers as the base does",
    "scaled": "of the way from the base to the release",
    "prefix": "it answers as the base does",
    "disjoint": "it answers as the base does",
    "swapped": "it answers as the version before it does",
    "ignored": "it answers as the base does",
}
"""not_delivered is not among them, as a request would end the engine; nor is one zeroed module of
14, which changes as little as rounding does: the weights tell it.
"""


def strength(seed: int, by: float) -> LoraTensors:
    return tiny_adapter(seed, strength=by)


def name_of(release: StoredRelease) -> str:
    return f"lorikeet@{release.label}"


async def test_each_silent_failure_is_found_before_a_user_meets_it() -> None:
    async with proving_node() as node:
        good = node.release(strength(11, 0.3), version=11)
        await node.serve(good)
        bad = node.release(strength(12, 0.3), version=12)
        await releases_that_are_served_pass(node)
        await node.control.point(name_of(good))
        for fault, said in IN_THE_WORKER.items():
            await the_weights_tell(node, fault, said, bad, good)
        for fault, said in IN_THE_ANSWERS.items():
            await the_answers_tell(node, fault, said, bad, good)
        await a_cut_file_is_never_loaded(node, good)
        await a_stale_prefix_cache_is_found(node, bad, good)
        await another_base_is_found(node, bad, good)
        await a_scale_too_small_for_answers_is_found_by_the_weights(node)
        assert (await node.control.state()).target == name_of(good)
        await answers_name_their_weights(node, good)
        assert node.reckoner.starts == 1


async def releases_that_are_served_pass(node: ProvingNode) -> None:
    """From one that changes everything to one that is not told from the base."""
    tells = []
    for number, by in ((1, 1.0), (2, 0.2), (3, 0.01)):
        release = node.release(strength(number, by), version=number)
        await node.serve(release)
        assert node.proof.last is not None
        tells.append(node.proof.last.tells)
    assert tells == [True, True, False]


async def seed(node: ProvingNode, fault: str, other: StoredRelease) -> None:
    node.fault_file.write_text(f"{fault} {other.path}")


async def the_weights_tell(
    node: ProvingNode, fault: str, said: str, bad: StoredRelease, good: StoredRelease
) -> None:
    await seed(node, fault, good)
    with pytest.raises(NotProved, match=said):
        await node.proof.load(name_of(bad), bad)
    node.fault_file.unlink()
    state = await node.control.state()
    assert (state.target, name_of(bad) in state.loaded) == (name_of(good), False), fault


async def the_answers_tell(
    node: ProvingNode, fault: str, said: str, bad: StoredRelease, good: StoredRelease
) -> None:
    await seed(node, fault, good)
    await node.control.load(name_of(bad), bad.path, proved=False)
    refused = await ask(node, name_of(bad))
    assert refused.status_code == 404, "no client may name it yet"
    with pytest.raises(NotProved, match=said):
        await node.proof.expect(name_of(bad), bad, good)
    node.fault_file.unlink()
    state = await node.control.state()
    assert (state.target, name_of(bad) in state.loaded) == (name_of(good), False), fault


async def ask(node: ProvingNode, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "w1 w2", "max_tokens": 1}
    return await node.http.post(COMPLETIONS, json=body)


async def a_cut_file_is_never_loaded(node: ProvingNode, good: StoredRelease) -> None:
    tensors = strength(13, 0.3)
    release = node.release(tensors, version=13)
    fewer = LoraTensors(dict(list(tensors.modules.items())[:3]))
    kept = node.release(fewer, version=14).path / ADAPTER
    shutil.copy(kept, release.path / ADAPTER)  # whole by itself: vLLM would not complain
    with pytest.raises(NotProved, match=f"{ADAPTER} is not what central signed"):
        await node.proof.load(name_of(release), release)
    assert not release.path.exists(), "it is downloaded again"
    release = node.release(tensors, version=13)
    data = (release.path / ADAPTER).read_bytes()
    (release.path / ADAPTER).write_bytes(data[: len(data) // 2])
    with pytest.raises(NotProved, match=f"{ADAPTER} is not what central signed"):
        await node.proof.load(name_of(release), release)
    assert (await node.control.state()).target == name_of(good)


async def a_stale_prefix_cache_is_found(
    node: ProvingNode, bad: StoredRelease, good: StoredRelease
) -> None:
    """The same name and directory, loaded with other bytes and asked the canaries before."""
    mine = (bad.path / ADAPTER).read_bytes()
    shutil.copy(good.path / ADAPTER, bad.path / ADAPTER)
    await node.control.load(name_of(bad), bad.path, proved=False)
    with pytest.raises(NotProved):  # warms the cache, and unloads
        await node.proof.expect(name_of(bad), bad, good)
    (bad.path / ADAPTER).write_bytes(mine)
    await node.proof.load(name_of(bad), bad)
    with pytest.raises(NotProved, match="an answer from the prefix cache is not the one"):
        await node.proof.expect(name_of(bad), bad, good)


async def another_base_is_found(node: ProvingNode, bad: StoredRelease, good: StoredRelease) -> None:
    other = read_base_model(tiny_model(1))
    proof = Proof(node.data_dir, node.store, node.control, node.references(other), node.reckoner)
    await node.control.load(name_of(bad), bad.path, proved=False)
    with pytest.raises(NotProved, match="the base that vLLM serves is not the base"):
        await proof.expect(name_of(bad), bad, good)


async def a_scale_too_small_for_answers_is_found_by_the_weights(node: ProvingNode) -> None:
    release = node.release(strength(15, 0.01), version=15)
    await seed(node, "scaled", release)
    await node.control.load(name_of(release), release.path, proved=False)
    await node.proof.expect(name_of(release), release, None)
    assert node.proof.last is not None
    assert not node.proof.last.tells
    await node.control.unload(name_of(release))
    with pytest.raises(NotProved, match="14 of its 14 modules are not held"):
        await node.proof.load(name_of(release), release)
    node.fault_file.unlink()


async def answers_name_their_weights(node: ProvingNode, good: StoredRelease) -> None:
    digest = good.manifest.payload.digest_sha256
    answer = await ask(node, "lorikeet")
    assert answer.headers["x-lorikeet-weights"] == answer.json()["system_fingerprint"] == digest
    base = (await node.control.state()).base
    of_base = await ask(node, base)
    assert of_base.headers["x-lorikeet-weights"] == node.base.digest
    assert of_base.json()["system_fingerprint"] == node.base.digest
    client = AsyncOpenAI(base_url=str(node.http.base_url.join("/v1")), api_key="none")
    question: Any = {"messages": [{"role": "user", "content": "w1 w2"}], "model": "lorikeet"}
    whole = await client.chat.completions.create(**question, max_tokens=2)
    assert whole.system_fingerprint == digest
    for usage in ({}, {"stream_options": {"include_usage": True}}):
        stream = await client.chat.completions.create(
            **question, max_tokens=2, stream=True, **usage
        )
        assert digest in [chunk.system_fingerprint async for chunk in stream]
    body = {"model": "lorikeet", "prompt": "w1", "max_tokens": 2, "stream": True}
    streamed = await node.http.post(COMPLETIONS, json=body)
    assert streamed.headers["x-lorikeet-weights"] == digest
    assert f'"system_fingerprint":"{digest}"' in streamed.text.replace(" ", "")
    await client.close()
