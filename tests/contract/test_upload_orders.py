"""An operator's order that comes while the last bytes of an upload are kept: it is obeyed."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest

from central.fleet.revocation import revoke_node
from central.intake.admission import Admission
from central.journal import EventKind, NewEvent
from central.operators.forgetting import order_forget
from tests.contract.central_harness import Central, Node, encode_factors, refusal

PAYLOAD = encode_factors()


def give_before(monkeypatch: pytest.MonkeyPatch, step: str, order: Any) -> None:
    """Let `order` be given just before this step of the next upload."""
    real = getattr(Admission, step)

    def later(*arguments: Any) -> Any:
        order()
        return real(*arguments)

    monkeypatch.setattr(Admission, step, later)


@pytest.mark.parametrize("step", ["_keep", "_admit"])
async def test_a_node_revoked_meanwhile_is_refused(
    central: Central, node: Node, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    rooms, manifest = central.rooms, node.manifest(PAYLOAD)
    give_before(monkeypatch, step, lambda: revoke_node(rooms.journal, node.node_id, "tests"))
    status, why, _ = await refusal(node.upload(PAYLOAD))
    assert (status, why) == (grpc.StatusCode.PERMISSION_DENIED, "REVOKED_NODE")
    expect_nothing(central, node, manifest.digest)
    # What was kept before the order is an unnamed blob, which retention collects.
    assert (manifest.payload.digest_sha256 in rooms.blobs) == (step == "_admit")


@pytest.mark.parametrize("step", ["_keep", "_admit"])
async def test_bytes_that_are_to_be_forgotten_meanwhile_are_refused(
    central: Central, node: Node, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Another node had sent the same bytes; the order is about that contribution."""
    rooms, manifest = central.rooms, node.manifest(PAYLOAD)
    other = await central.enroll("b", await central.token())
    await other.upload(PAYLOAD)
    same = other.manifest(PAYLOAD).digest

    def order() -> None:
        order_forget(rooms.journal, rooms.blobs, same, accept_loss=False, by="tests")
        if step == "_keep":  # retention has done its part too
            rooms.blobs.delete(manifest.payload.digest_sha256)

    give_before(monkeypatch, step, order)
    status, why, _ = await refusal(node.upload(PAYLOAD))
    assert (status, why) == (grpc.StatusCode.FAILED_PRECONDITION, "FORGOTTEN")
    expect_nothing(central, node, manifest.digest)
    assert (manifest.payload.digest_sha256 in rooms.blobs) == (step == "_admit")


async def test_an_order_waits_while_an_update_is_recorded(
    central: Central, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing comes between the last look at the orders and the event."""
    journal = central.rooms.journal
    order = threading.Thread(target=revoke_node, args=(journal, node.node_id, "tests"))
    real = journal.append

    def append(*events: NewEvent) -> Any:
        if threading.current_thread() is not order:
            order.start()
            order.join(0.3)
        return real(*events)

    monkeypatch.setattr(journal, "append", append)
    await node.upload(PAYLOAD)
    await asyncio.to_thread(order.join)
    kinds = [event.kind for event in journal.events()]
    assert kinds.index(EventKind.UPDATE_ADMITTED) < kinds.index(EventKind.NODE_REVOKED)


def expect_nothing(central: Central, node: Node, update_id: str) -> None:
    """No event, and no byte that counts in the node's quota."""
    with central.rooms.journal.read() as state:
        assert update_id not in state.updates
    assert central.rooms.uploads.held_bytes(node.node_id, "", ()) == 0
