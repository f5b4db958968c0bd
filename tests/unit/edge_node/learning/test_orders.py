"""What an operator orders is on disk at once, and a hand-over and a cancel never both win."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from edge_node.learning.orders import OrderRefused, Orders, RoundCancelled
from edge_node.learning.records import RoundStore, open_starts
from tests.unit.edge_node.learning.test_records import make_plan


def nobody(round_id: str) -> bool:
    return False


def test_a_wish_is_durable_until_such_a_round_begins(tmp_path: Path) -> None:
    Orders(RoundStore(tmp_path)).want("grpo")
    Orders(RoundStore(tmp_path)).want("sft")
    store = RoundStore(tmp_path)
    orders = Orders(store)
    wish = orders.wish()
    assert wish is not None
    assert wish.method == "sft", "the last one counts"
    store.begin(make_plan(1))
    assert orders.wish() is None
    with pytest.raises(OrderRefused, match=r"Round r000001-v0-\w+ runs; expected none"):
        orders.want("sft")
    assert orders.wish() is None


def test_a_round_of_another_kind_leaves_the_wish(tmp_path: Path) -> None:
    store = RoundStore(tmp_path)
    Orders(store).want("grpo")
    store.begin(make_plan(1))
    assert Orders(store).wish() is not None


def test_a_wish_is_taken_back(tmp_path: Path) -> None:
    orders = Orders(RoundStore(tmp_path))
    assert not orders.withdraw()
    orders.want("sft")
    assert orders.withdraw()
    assert orders.wish() is None


def test_a_cancelled_round_is_no_unfinished_one_for_anybody(tmp_path: Path) -> None:
    store = RoundStore(tmp_path / "learning")
    plan = make_plan(1)
    store.begin(plan)
    store.workspace(plan.round_id)
    Orders(store).expect_wanted(plan.round_id)
    Orders(RoundStore(tmp_path / "learning")).cancel(plan, nobody)
    assert store.unfinished() is None
    assert open_starts(tmp_path) == set()
    with pytest.raises(RoundCancelled):
        Orders(store).expect_wanted(plan.round_id)
    with pytest.raises(RoundCancelled), Orders(store).handing_over(plan.round_id):
        pytest.fail("the update would be handed over")
    store.finish(plan.round_id, "4" * 64)  # a learner that did not see it yet
    (end,) = store.ends()
    assert (end.state, end.result) == ("cancelled", "by an operator")
    assert store.explored(plan.release_id), "no grpo round starts by itself in its place"
    assert not store.workspace("x").with_name(plan.round_id).exists()
    store.begin(make_plan(2))


def test_a_round_that_has_ended_cannot_be_cancelled(tmp_path: Path) -> None:
    store = RoundStore(tmp_path)
    plan = make_plan(1)
    store.begin(plan)
    store.give_up(plan.round_id, "no gain")
    with pytest.raises(OrderRefused, match="has ended meanwhile"):
        Orders(store).cancel(plan, nobody)
    assert store.ends()[0].state == "given up"


def test_a_cancel_waits_for_a_hand_over_and_is_refused_then(tmp_path: Path) -> None:
    store = RoundStore(tmp_path)
    plan = make_plan(1)
    store.begin(plan)
    in_outbox: set[str] = set()
    refused: list[OrderRefused] = []

    def cancel() -> None:
        try:
            Orders(RoundStore(tmp_path)).cancel(plan, in_outbox.__contains__)
        except OrderRefused as error:
            refused.append(error)

    thread = threading.Thread(target=cancel)
    with Orders(store).handing_over(plan.round_id):
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        in_outbox.add(plan.round_id)
    thread.join(10)
    assert "its update is in the outbox" in str(refused[0])
    assert store.unfinished() == plan, "it is recorded as finished by the learner"


def test_a_hand_over_that_fails_leaves_the_round_as_it_was(tmp_path: Path) -> None:
    store = RoundStore(tmp_path)
    plan = make_plan(1)
    store.begin(plan)
    with pytest.raises(OSError, match="full"), Orders(store).handing_over(plan.round_id):
        raise OSError("full")
    assert store.unfinished() == plan
