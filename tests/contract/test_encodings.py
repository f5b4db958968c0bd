"""Updates in several encodings, and releases in one: merged, verified, forgotten, refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from central.merging import merge as product_merge
from protos.encoding import ENCODINGS, Encoding
from protos.lora import LoraTensors, decode, encode
from tests.contract import central_harness as harness
from tests.contract.central_harness import Node, refusal
from tests.contract.cohort_loop import Central, make_settings, opened, take_steps
from tests.contract.forgetting import NODES, forget, increment, line, payload, run_until
from tests.contract.merge_steps import all_identical

SENT: Mapping[str, Encoding] = dict(zip(NODES, ENCODINGS, strict=True))


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        central.join("shared", *NODES)
        yield central


def release(central: Central, version: int, encoding: Encoding) -> list[str]:
    """One release of an update of each node, each in its own encoding; ids of the updates."""
    ids = [
        central.admit(node, increment(version, node), sequence=version, encoding=SENT[node])  # type: ignore[arg-type]
        for node in NODES
    ]
    settings = make_settings(min_updates=len(NODES), encoding=encoding)
    take_steps(central, settings, lambda: central.head().manifest.version == version)
    return ids


@pytest.mark.parametrize("released", ENCODINGS)
def test_mixed_encodings_are_merged_exactly_verified_and_forgotten(
    loop: Central, released: Encoding
) -> None:
    parent = LoraTensors()
    for version in (1, 2):
        release(loop, version, released)
        sent = [decode(encode(increment(version, node), SENT[node])) for node in NODES]  # type: ignore[arg-type]
        merged = product_merge(
            parent, [(item, 1 / 3) for item in sent], rank=8, server_step=1.0, seed=0
        )
        assert payload(loop) == encode(merged.tensors, released), "what is released is rounded"
        parent = decode(payload(loop))  # and the next merge adds to what was released
    assert all_identical(loop)
    assert run_until(loop, forget(loop, NODES[1]), encoding=released) == "done"
    assert all_identical(loop)


def test_a_removal_replays_each_merge_in_the_encoding_that_it_had(loop: Central) -> None:
    release(loop, 1, "int8")
    release(loop, 2, "float32")
    assert run_until(loop, forget(loop, NODES[0]), encoding="bf16") == "done"
    assert encode(decode(payload(loop))) == payload(loop), "the last merge was in float32"
    assert all_identical(loop)


def test_releases_without_a_setting_are_float32_and_their_plans_say_nothing(loop: Central) -> None:
    release(loop, 1, "float32")
    plan_id = line(loop)[-1].plan_id
    with loop.journal.read() as state:
        assert b"encoding" not in state.plans[plan_id or ""].plan.to_bytes()
    assert encode(decode(payload(loop))) == payload(loop)


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
async def test_an_encoded_update_is_admitted_and_one_in_another_encoding_is_refused(
    node: Node, encoding: Encoding
) -> None:
    data = encode(harness.make_factors(), encoding)
    _, why, text = await refusal(node.upload(data))
    assert why == "BAD_DTYPE", text
    stated = node.manifest(data, encoding=encoding, encoding_error=0.002)
    assert (await node.upload(data, stated)).body
