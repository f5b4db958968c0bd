"""A revoked node: its calls are refused, its watch ends, its updates are not merged."""

from __future__ import annotations

import asyncio

import grpc

from central.journal import EventKind
from protos.fleet.v1 import fleet_pb2
from protos.lora import LoraTensors, encode
from protos.operators.v1 import operators_pb2
from tests.contract import central_harness as harness
from tests.contract.central_harness import (
    Q_PROJ,
    Central,
    Node,
    encode_factors,
    refusal,
)
from tests.unit.central import builders as make


async def test_a_revoked_node_is_refused_and_its_watch_ends(central: Central, node: Node) -> None:
    watch = node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20)
    await watch.read()
    await central.operators.RevokeNode(
        operators_pb2.RevokeNodeRequest(node_id=node.node_id), timeout=20
    )

    async def read_to_end() -> None:
        while await watch.read() is not grpc.aio.EOF:
            pass

    assert (await refusal(read_to_end()))[1] == "REVOKED_NODE"
    assert (await refusal(node.query("0" * 64)))[1] == "REVOKED_NODE"
    listed = (
        await central.operators.ListNodes(operators_pb2.ListNodesRequest(), timeout=20)
    ).nodes[0]
    assert (listed.revoked, listed.connected) == (True, False)


async def test_a_revoked_nodes_updates_are_not_merged_any_more(
    central: Central, node: Node
) -> None:
    other = await central.enroll("b", await central.token())
    payloads = [encode_factors(seed) for seed in range(3)]
    for sender, payload in ((node, payloads[0]), (other, payloads[1])):
        await sender.upload(payload)
    plan = make.make_plan(node.genesis, node.manifest(payloads[0]), other.manifest(payloads[1]))
    await asyncio.to_thread(central.rooms.journal.append, make.planned(plan))
    merged = encode(LoraTensors({Q_PROJ: harness.make_factors(9).modules[Q_PROJ]}))
    candidate = await asyncio.to_thread(
        central.rooms.registry.add_candidate, plan.digest, merged, 0.25
    )
    for _ in range(2):  # the second time nothing more happens
        await central.operators.RevokeNode(
            operators_pb2.RevokeNodeRequest(node_id=node.node_id), timeout=20
        )
    with central.rooms.journal.read() as state:
        assert [update.manifest.node_id for update in state.waiting("shared")] == [other.node_id]
        aside = state.updates[node.manifest(payloads[0]).digest]
        assert (aside.state, aside.reason) == ("set_aside", "its node was revoked")
        assert (state.releases[candidate.digest].state, state.open_plans("shared")) == (
            "rejected",
            [],
        )
    events = central.rooms.journal.events()[-3:]
    assert [event.kind for event in events] == [
        EventKind.UPDATE_SET_ASIDE, EventKind.TOKEN_REVOKED, EventKind.NODE_REVOKED
    ]  # fmt: skip
    assert events[2].body == {"by": "operator"}
