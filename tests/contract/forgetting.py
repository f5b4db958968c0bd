"""Releases, orders to forget, and the history that they are compared with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from central.journal import EventKind, NewEvent, ReleaseRecord
from central.operators.forgetting import order_forget
from tests.contract.cohort_loop import (
    Central,
    make_increment,
    make_settings,
    opened,
    take_steps,
)

NODES = ("a-1", "b-2", "c-3")


def release(
    central: Central, version: int, nodes: Sequence[str] = NODES, **merge: object
) -> list[str]:
    """One release of one update per node; ids of the updates."""
    ids = [central.admit(node, increment(version, node), sequence=version) for node in nodes]
    settings = make_settings(min_updates=len(nodes), **merge)
    take_steps(central, settings, lambda: central.head().manifest.version == version)
    return ids


def increment(version: int, node: str) -> object:
    return make_increment(10 * version + NODES.index(node))


def forget(central: Central, target: str, **options: object) -> str:
    given = {"accept_loss": False, **options}
    return order_forget(central.journal, central.blobs, target, by="tests", **given).order.order_id  # type: ignore[arg-type]


def run_until(central: Central, order_id: str, **settings: object) -> str:
    """The state in which the order ends."""
    take_steps(
        central,
        make_settings(**settings),
        lambda: order_state(central, order_id) not in ("ordered", "planned"),
    )  # type: ignore[arg-type]
    return order_state(central, order_id)


def order_state(central: Central, order_id: str) -> str:
    with central.journal.read() as state:
        return state.forgets[order_id].state


def states(central: Central, ids: Collection[str]) -> list[str]:
    with central.journal.read() as state:
        return [state.updates[update_id].state for update_id in ids]


def line(central: Central) -> list[ReleaseRecord]:
    with central.journal.read() as state:
        return state.lineage(central.head().release_id)[::-1]


def history_without(
    root: Path, origin: Central, versions: Sequence[int], gone: Collection[str]
) -> bytes:
    """The head's payload of another central whose plans never had these updates.

    The others have the same weights.
    """
    root.mkdir()
    with opened(root) as other:
        other.join("shared", *NODES)
        for version in versions:
            (record,) = [r for r in line(origin) if r.manifest.version == version]
            with origin.journal.read() as state:
                plan = state.plans[record.plan_id or ""].plan
                left = [u for u in plan.updates if u.update_id not in gone]
                nodes = {u.update_id: state.updates[u.update_id].manifest.node_id for u in left}
            head = other.head().manifest
            again = [
                u.model_copy(
                    update={
                        "update_id": other.admit(
                            nodes[u.update_id],
                            increment(version, nodes[u.update_id]),
                            sequence=version,
                        )
                    }
                )
                for u in left
            ]
            # A strategy that divides by the sum of the weights gets what is left of it as its step.
            share = 1.0 if plan.strategy == "product-mean" else len(left) / len(plan.updates)
            step = plan.server_step * share
            changed = {
                "parent": head.digest,
                "version": head.version + 1,
                "updates": again,
                "server_step": step,
            }
            propose = plan.model_copy(update=changed)
            body = {"plan": propose.to_bytes().decode()}
            other.journal.append(NewEvent(EventKind.MERGE_PLANNED, "shared", propose.digest, body))
            take_steps(
                other,
                make_settings(),
                lambda v=head.version + 1: other.head().manifest.version == v,
            )  # type: ignore[misc]
        return other.blobs.read(other.head().manifest.payload.digest_sha256)


def payload(central: Central) -> bytes:
    return central.blobs.read(central.head().manifest.payload.digest_sha256)


def remove(central: Central, update_id: str) -> None:
    """As retention would."""
    with central.journal.read() as state:
        digest = state.updates[update_id].manifest.payload.digest_sha256
    central.blobs.delete(digest)


def line_states(central: Central) -> list[str]:
    with central.journal.read() as state:
        return [r.state for r in state.releases.values() if r.state != "candidate"]
