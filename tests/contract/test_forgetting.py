"""Forgetting on a real journal with real merges: what is exact, what the gate says, what can no longer be used, crashes."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from central.errors import Refused
from central.federation.server_state import ServerState
from central.federation.verify import verify_releases
from central.journal import EventKind, NewEvent, ReleaseRecord
from central.operator.contributions import requeue
from central.operator.forgetting import order_forget, propose_forget
from central.settings import ChannelSettings
from protos.lora import decode
from tests.contract.cohort_loop import (
    KEY,
    NAMES,
    Central,
    answering,
    crashing_at,
    make_increment,
    make_settings,
    opened,
    result,
    take_steps,
)
from tests.contract.test_releases_verify import public_key

NODES = ("a-1", "b-2", "c-3")


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        yield central


def release(central: Central, version: int, nodes: Sequence[str] = NODES, **merge: object) -> list[str]:
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
    take_steps(central, make_settings(**settings), lambda: order_state(central, order_id) not in ("ordered", "planned"))  # type: ignore[arg-type]
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


def history_without(root: Path, origin: Central, versions: Sequence[int], gone: Collection[str]) -> bytes:
    """The head's payload of another central whose plans never had these updates; the others have the same weights."""
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
                            nodes[u.update_id], increment(version, nodes[u.update_id]), sequence=version
                        )
                    }
                )
                for u in left
            ]
            # A strategy that divides by the sum of the weights gets what is left of it as its step.
            share = 1.0 if plan.strategy == "product-mean" else len(left) / len(plan.updates)
            step = plan.server_step * share
            changed = {"parent": head.digest, "version": head.version + 1, "updates": again, "server_step": step}
            propose = plan.model_copy(update=changed)
            body = {"plan": propose.to_bytes().decode()}
            other.journal.append(NewEvent(EventKind.MERGE_PLANNED, "shared", propose.digest, body))
            take_steps(other, make_settings(), lambda v=head.version + 1: other.head().manifest.version == v)  # type: ignore[misc]
        return other.blobs.read(other.head().manifest.payload.digest_sha256)


def payload(central: Central) -> bytes:
    return central.blobs.read(central.head().manifest.payload.digest_sha256)


@pytest.mark.parametrize("strategy", ["product-mean", "FedAdam"])
def test_a_replay_is_bit_identical_to_a_history_without_the_node(
    central: Central, tmp_path: Path, strategy: str
) -> None:
    central.join("shared", *NODES)
    release(central, 1, NODES[:1], strategy=strategy)
    ids = [release(central, version, strategy=strategy)[1] for version in (2, 3)]
    release(central, 4, (NODES[0], NODES[2]), strategy=strategy)
    before = line(central)
    expected = history_without(tmp_path / "other", central, [1, 2, 3, 4], ids)
    order = forget(central, "b-2")
    assert states(central, ids) == ["merged", "merged"], (
        "the stable head holds them until there is a release without them"
    )
    assert run_until(central, order, strategy=strategy) == "done"
    head = central.head()
    assert payload(central) == expected
    assert (head.manifest.version, head.manifest.parent, head.manifest.updates) == (5, before[-1].release_id, [])
    assert states(central, ids) == ["forgotten", "forgotten"]
    with central.journal.read() as state:
        assert set(state.contributions(head.release_id)).isdisjoint(ids)
        assert [state.releases[r.release_id].state for r in before] == ["accepted"] * 2 + ["withdrawn"] * 3
        removal = state.plans[head.plan_id or ""].plan.removal
        assert removal is not None
        assert (removal.merges, removal.since) == (3, before[1].release_id)
        found = list(verify_releases(state, state.releases.values(), central.blobs, public_key(KEY), False))
    assert {finding.outcome for finding in found} == {"identical"}
    # What comes next builds on it, and what carries state goes on from the state without it.
    release(central, 6, (NODES[0], NODES[2]), strategy=strategy)
    with central.journal.read() as state:
        found = list(verify_releases(state, [central.head()], central.blobs, public_key(KEY), True))
    assert {finding.outcome for finding in found} == {"identical"}


def test_after_a_merge_is_taken_out_whole_the_strategy_goes_on_from_the_release_before(central: Central) -> None:
    central.join("shared", *NODES)
    release(central, 1, NODES[:1], strategy="FedAdam")
    before = central.head()
    release(central, 2, NODES[1:2], strategy="FedAdam")
    assert run_until(central, forget(central, "b-2")) == "done"
    assert central.head().server_state == before.server_state
    release(central, 4, NODES[2:], strategy="FedAdam")
    state = ServerState.from_bytes(central.blobs.read(central.head().server_state or ""))
    assert state.merges == 2, "as if the merge of b had never been"


def test_without_the_payloads_of_a_replay_it_is_refused(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    release(central, 2)
    remove(central, ids[0])
    expected = r"2 merges since v0-\w+ cannot be done again: 1 payloads are no longer kept.*return to v0-\w+ with"
    with pytest.raises(Refused, match=expected):
        forget(central, ids[1])
    with central.journal.read() as state:
        assert not state.forgets


def test_what_it_takes_out_is_not_read(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    remove(central, ids[1])
    assert run_until(central, forget(central, ids[1])) == "done"


def test_what_no_release_in_use_holds_is_forgotten_with_the_order(central: Central) -> None:
    central.join("shared", *NODES)
    release(central, 1, NODES[:1])
    waiting = central.admit("b-2", increment(2, "b-2"), sequence=2)  # type: ignore[arg-type]
    aside = central.admit("b-2", increment(3, "b-2"), sequence=3)  # type: ignore[arg-type]
    central.journal.append(NewEvent(EventKind.UPDATE_SET_ASIDE, "shared", aside, {"reason": "tests"}))
    order = forget(central, "b-2")
    assert order_state(central, order) == "done"
    assert states(central, [waiting, aside]) == ["forgotten", "forgotten"]
    with pytest.raises(
        Refused, match=r"is forgotten; only one that is set aside can wait again. Nothing brings it back"
    ):
        requeue(central.journal, central.blobs, [aside], "tests")
    with pytest.raises(Refused, match="no update here that is not forgotten already"):
        forget(central, "b-2")
    with pytest.raises(Refused, match="is forgotten already: by order of tests"):
        forget(central, aside)


def test_a_merge_under_way_loses_what_is_forgotten_and_the_others_wait_again(central: Central) -> None:
    central.join("shared", *NODES)
    ids = [central.admit(node, increment(1, node)) for node in NODES]  # type: ignore[arg-type]
    take_steps(central, make_settings(quorum=1), lambda: "planned" in states(central, ids))
    assert order_state(central, forget(central, ids[1])) == "done"
    assert states(central, ids) == ["waiting", "forgotten", "waiting"]
    take_steps(central, make_settings(), lambda: central.head().manifest.version == 1)
    assert states(central, ids) == ["merged", "forgotten", "merged"]


def test_the_gate_decides_unless_the_operator_accepts_the_loss(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    before = payload(central)

    def lost(node: str) -> tuple[list, str]:
        return [result("acme", both=2, b=14, c=0, neither=4)], ""

    with answering(central.journal, lost):
        order = forget(central, "b-2")
        assert run_until(central, order, quorum=1) == "rejected"
        assert payload(central) == before
        assert states(central, ids) == ["merged"] * 3
        with central.journal.read() as state:
            assert "acme fell" in state.forgets[order].reason
            assert not state.isolations
        order = forget(central, "b-2", accept_loss=True)
        assert run_until(central, order, quorum=1) == "done"
    head = central.head()
    assert states(central, ids) == ["merged", "forgotten", "merged"]
    assert head.verdict is not None
    assert head.verdict.loss_accepted_by == "tests"
    assert head.verdict.text.startswith("accepted by tests in spite of the gate, which rejected: acme fell")
    with central.journal.read() as state:
        assert state.channel_changes[("shared", "stable")][-1].by == "tests"


def test_what_holds_it_can_no_longer_be_used_and_earlier_releases_can(central: Central) -> None:
    central.join("shared", *NODES)
    release(central, 1, NODES[:1])
    ids = release(central, 2)
    late = release(central, 3, (NODES[0], NODES[2]))
    _, first, second, third = line(central)
    central.registry.promote(third.release_id, "canary", "tests")
    assert run_until(central, forget(central, ids[1])) == "done"
    with central.journal.read() as state:
        assert ("shared", "canary") not in state.channels
        assert state.forgotten_in(third.release_id) == [ids[1]]
        assert state.forgotten_in(central.head().release_id) == []
    with pytest.raises(Refused, match="is withdrawn"):
        central.registry.promote(second.release_id, "canary", "tests")
    with pytest.raises(Refused, match=f"holds a contribution that was forgotten.*{first.manifest.label}"):
        central.registry.rollback("shared", None, "requeue", "tests")
    central.registry.rollback("shared", first.release_id, "requeue", "tests")
    assert central.head().release_id == first.release_id
    assert states(central, [*ids, *late]) == ["waiting", "forgotten", "waiting", "waiting", "waiting"]


def test_a_withdrawn_release_without_its_payloads_says_why_it_cannot_be_rebuilt(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    release(central, 2)
    assert run_until(central, forget(central, ids[1])) == "done"
    remove(central, ids[1])
    with central.journal.read() as state:
        found = list(verify_releases(state, state.releases.values(), central.blobs, public_key(KEY), True))
    assert [finding.outcome for finding in found] == ["identical", "forgotten", "identical", "identical"]
    assert f"made with update {ids[1][:12]} of b-2, which was forgotten" in found[1].problem


def test_forgetting_again_goes_back_to_before_the_first(central: Central, tmp_path: Path) -> None:
    central.join("shared", *NODES)
    first = release(central, 1)
    second = release(central, 2)
    expected = history_without(tmp_path / "other", central, [1, 2], [first[0], second[1]])
    assert run_until(central, forget(central, first[0])) == "done"
    assert run_until(central, forget(central, second[1])) == "done"
    assert payload(central) == expected
    with central.journal.read() as state:
        assert sorted(state.contributions(central.head().release_id)) == sorted(
            {*first, *second} - {first[0], second[1]}
        )
    # The last of a node, of everybody: what is left is the base.
    for node in NODES:
        assert run_until(central, forget(central, node)) == "done"
    assert not decode(payload(central)).modules


def test_a_repeat_finds_the_order_and_a_part_of_one_waits(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    order = forget(central, ids[1])
    assert forget(central, ids[1]) == order
    late = central.admit("b-2", increment(2, "b-2"), sequence=2)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="is forgetting a part of this already"):
        forget(central, "b-2")
    assert run_until(central, order) == "done"
    assert states(central, [late]) == ["waiting"]


def test_a_rollback_before_it_is_merged_does_the_rest(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    order = forget(central, ids[1])
    central.registry.rollback("shared", None, "requeue", "tests")
    assert order_state(central, order) == "done"
    assert states(central, ids) == ["waiting", "forgotten", "waiting"]


def test_a_replay_that_cannot_be_made_ends_the_order_and_changes_nothing(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    order = forget(central, ids[1])
    remove(central, ids[0])
    assert run_until(central, order) == "failed"
    assert states(central, ids) == ["merged"] * 3
    with central.journal.read() as state:
        assert "Restore" in state.forgets[order].reason
        assert state.open_plans("shared") == []


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_crash_at_any_append_ends_the_same(stride: int, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    with opened(origin) as central:
        central.join("shared", *NODES)
        ids = [update for version in (1, 2) for update in release(central, version)]
        forget(central, "b-2")
    ends, crashes, point = set(), 0, 0
    while True:
        root = tmp_path / str(point)
        shutil.copytree(origin, root)
        crashed = _run_with_crash(root, point)
        crashes += crashed
        if crashed:
            assert not _run_with_crash(root, None)
        with opened(root) as central, central.journal.read() as state:
            assert central.journal.verify() == state.sequence
            ends.add((central.head().release_id, tuple(states(central, ids)), len(state.plans)))
        if not crashed:
            break
        point += stride
    assert crashes == -(-2 * 4 // stride), "plan, candidate, evaluation, verdict"
    assert len(ends) == 1


def _run_with_crash(root: Path, crash_at: int | None) -> bool:
    """True when it crashed."""
    with opened(root) as central:
        with central.journal.read() as state:
            (order,) = state.forgets
        reports = answering(central.journal, lambda node: ([result("acme")], ""))
        with crashing_at(central, crash_at) as crash, reports:
            assert run_until(central, order, quorum=1) == "done"
        return crash.happened


def remove(central: Central, update_id: str) -> None:
    """As retention would."""
    with central.journal.read() as state:
        digest = state.updates[update_id].manifest.payload.digest_sha256
    central.blobs.delete(digest)


def test_a_cohort_that_builds_on_it_is_composed_anew(tmp_path: Path) -> None:
    settings = {"min_updates": 1}
    with opened(tmp_path, {"acme": "shared"}) as central:
        central.join("shared", *NODES)
        ids = release(central, 1)
        central.join("acme", "d-4")
        own = central.admit("d-4", make_increment(90), "acme")
        take_steps(central, make_settings(**settings), lambda: "merged" in states(central, [own]), "acme")  # type: ignore[arg-type]
        take_steps(central, make_settings(**settings), lambda: central.head("acme").manifest.version == 2, "acme")  # type: ignore[arg-type]
        holding = central.head("acme")
        proposal = propose_forget(central.journal, central.blobs, ids[1], False, "tests")
        assert proposal.composed == ("acme",)
        assert run_until(central, forget(central, ids[1])) == "done"
        with central.journal.read() as state:
            assert state.forgotten_in(holding.release_id) == [ids[1]]
            assert state.releases[holding.release_id].state == "accepted", "what acme serves until it has another"
        take_steps(central, make_settings(**settings), lambda: central.head("acme") != holding, "acme")  # type: ignore[arg-type]
        with central.journal.read() as state:
            assert state.forgotten_in(central.head("acme").release_id) == []
            assert state.releases[holding.release_id].state == "withdrawn"
        # Its own contribution goes from its own chain, and what it is composed with stays.
        assert run_until_in(central, forget(central, "d-4"), "acme") == "done"
        served, shared = (central.product(central.head(cohort), NAMES[0]) for cohort in ("acme", "shared"))
        np.testing.assert_allclose(served, shared, atol=1e-5)


def run_until_in(central: Central, order_id: str, cohort: str) -> str:
    over = ("done", "rejected", "failed")
    take_steps(central, make_settings(), lambda: order_state(central, order_id) in over, cohort)
    return order_state(central, order_id)


def test_what_only_a_canary_holds_is_forgotten_and_its_others_wait_again(central: Central) -> None:
    central.join("shared", *NODES)
    release(central, 1, NODES[:1])
    ids = [central.admit(node, increment(2, node), sequence=2) for node in NODES]  # type: ignore[arg-type]
    settings = make_settings(min_updates=3).model_copy(update={"channels": ChannelSettings(first="canary")})
    take_steps(central, settings, lambda: "merged" in states(central, ids))
    with central.journal.read() as state:
        canary = state.channels[("shared", "canary")]
    assert order_state(central, forget(central, ids[1])) == "done"
    assert states(central, ids) == ["waiting", "forgotten", "waiting"]
    with central.journal.read() as state:
        assert state.releases[canary].state == "withdrawn"
        assert ("shared", "canary") not in state.channels


def test_a_removal_soaks_on_canary_like_any_release(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    order = forget(central, ids[1])
    settings = make_settings().model_copy(update={"channels": ChannelSettings(first="canary")})

    def on_canary() -> bool:
        with central.journal.read() as state:
            return ("shared", "canary") in state.channels

    take_steps(central, settings, on_canary)
    assert (order_state(central, order), states(central, ids)) == ("planned", ["merged"] * 3), "stable still holds it"
    with central.journal.read() as state:
        canary = state.channels[("shared", "canary")]
    central.registry.promote(canary, "stable", "tests")
    assert (order_state(central, order), states(central, ids)) == ("done", ["merged", "forgotten", "merged"])


def test_a_removal_that_is_rolled_back_from_canary_leaves_everything_as_it_was(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    order = forget(central, ids[1])
    settings = make_settings().model_copy(update={"channels": ChannelSettings(first="canary")})
    take_steps(central, settings, lambda: len(line_states(central)) == 3)
    central.registry.rollback("shared", None, "requeue", "tests", "canary")
    assert (order_state(central, order), states(central, ids)) == ("failed", ["merged"] * 3)
    assert line_states(central) == ["accepted", "accepted", "abandoned"]


def line_states(central: Central) -> list[str]:
    with central.journal.read() as state:
        return [r.state for r in state.releases.values() if r.state != "candidate"]
