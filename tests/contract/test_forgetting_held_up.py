"""What holds up an order to forget, how it shows, and how each ends.

No node judges, an operator changes their mind, or the store is in trouble.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from central.blobs.store import BlobLost
from central.cli.forget_texts import cancelled, progress
from central.cohort import payload as payload_module
from central.cohort.errors import StrategyFailed
from central.cohort.verify import verify_releases
from central.errors import Refused, StorageError
from central.fleet.revocation import revoke_node
from central.operators.forgetting import cancel_forget, describe
from central.operators.listing import forget_message
from central.settings import ChannelSettings
from protos.operators.v1 import operators_pb2
from tests.contract.cohort_loop import (
    KEY,
    Central,
    answering,
    make_increment,
    make_settings,
    opened,
    result,
    take_steps,
)
from tests.contract.forgetting import (
    NODES,
    forget,
    line_states,
    order_state,
    payload,
    release,
    remove,
    states,
)
from tests.contract.looks import Clock
from tests.contract.test_releases_verify import public_key


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        central.join("shared", *NODES)
        yield central


def steps(
    central: Central, order: str, clock: Any, until: tuple[str, ...], **settings: object
) -> None:
    take_steps(
        central,
        make_settings(quorum=1, **settings),
        lambda: order_state(central, order) in until,
        clock=clock,  # type: ignore[arg-type]
    )


def told(central: Central, order: str, failure: str = "") -> operators_pb2.ForgetOrder:
    with central.journal.read() as state:
        return forget_message(state, describe(state, state.forgets[order]), failure)


def asked(central: Central, times: int) -> Any:
    """Whether a candidate was offered so many times."""

    def reached() -> bool:
        with central.journal.read() as state:
            return len(state.evaluations) >= times

    return reached


def below_quorum(central: Central, order: str) -> Clock:
    """The removal has been offered twice, and nobody gave a result."""
    clock = Clock(central)
    with answering(
        central.journal, lambda node: ([], "vLLM is restarting") if node == "a-1" else None
    ):
        take_steps(central, make_settings(quorum=1), asked(central, 2), clock=clock)
    assert order_state(central, order) == "planned"
    return clock


# Too few judges.


def test_below_the_quorum_an_order_says_why_it_waits_and_what_to_do(central: Central) -> None:
    release(central, 1)
    order = forget(central, "b-2")
    assert told(central, order).waits_for == ""
    below_quorum(central, order)
    (label,) = [told(central, order).candidate]
    assert progress(told(central, order)) == (
        f"order {order[:8]}: {label} is made and evaluated; it waits for results of as many nodes "
        "as CENTRAL_GATE__QUORUM says: asked 2 "
        "times, 0 gave one (a-1: vLLM is restarting; b-2: no report; c-3: no report). Nothing else "
        "of shared is merged meanwhile. Let a "
        "node evaluate, or take the order back with `central forget b-2 --cancel`; `central forget "
        "b-2 --accept-loss --yes` "
        "then releases it unjudged"
    )
    with answering(central.journal, lambda node: ([result("acme")], "")):
        steps(central, order, Clock(central), ("done",))
    assert told(central, order).waits_for == ""


@pytest.mark.parametrize("name", ["node", "update", "order"])
def test_an_order_is_taken_back_and_the_cohort_goes_on(central: Central, name: str) -> None:
    ids = release(central, 1)
    before = payload(central)
    unreleased = central.admit("b-2", make_increment(80), sequence=2)
    order = forget(central, "b-2")
    clock = below_quorum(central, order)
    waiting = central.admit("c-3", make_increment(90), sequence=2)
    target = {"node": "b-2", "update": ids[1][:8], "order": order[:8]}[name]
    taken_back = cancel_forget(central.journal, target, "tests")
    assert taken_back.order.order_id == order
    assert list(cancelled(told(central, order))) == [
        f"order {order[:8]} is taken back by tests: what was merged is still there (1)",
        f"  {unreleased[:12]} from b-2 was in no release; it was forgotten with the order and "
        "stays so",
    ]
    assert order_state(central, order) == "failed"
    assert (states(central, ids), payload(central)) == (["merged"] * 3, before)
    with answering(central.journal, lambda node: ([result("acme")], "")):
        take_steps(
            central,
            make_settings(quorum=1, min_updates=1),
            lambda: states(central, [waiting]) == ["merged"],
            clock=clock,
        )
    with pytest.raises(
        Refused, match=rf"No orders .* are for '{target}'.*`central forget --orders` lists them"
    ):
        cancel_forget(central.journal, target, "tests")
    # It can be ordered again.
    with answering(central.journal, lambda node: ([result("acme")], "")):
        steps(central, forget(central, "b-2"), clock, ("done",))
    assert states(central, ids) == ["merged", "forgotten", "merged"]


def test_whose_loss_is_accepted_is_released_unjudged_after_one_look(central: Central) -> None:
    ids = release(central, 1)
    order = forget(central, "b-2", accept_loss=True)
    clock = Clock(central)
    steps(central, order, clock, ("done",))
    assert states(central, ids) == ["merged", "forgotten", "merged"]
    verdict = central.head().verdict
    assert verdict is not None
    assert verdict.text == (
        "accepted by tests in spite of the gate, which had 0 results and needs 1 "
        "(CENTRAL_GATE__QUORUM)."
    )
    assert 60 <= clock.seconds < 120, "one deadline"
    with central.journal.read() as state:
        assert len(state.evaluations) == 1
        found = list(
            verify_releases(state, [central.head()], central.blobs, public_key(KEY), False)
        )
    assert [finding.outcome for finding in found] == ["identical"]


def test_an_order_that_waits_is_taken_back_and_given_again_with_its_loss_accepted(
    central: Central,
) -> None:
    ids = release(central, 1)
    order = forget(central, "b-2")
    clock = below_quorum(central, order)
    late = central.admit("b-2", make_increment(80), sequence=2)
    words = rf"under way and leaves the decision to the gate.*`central forget {order[:8]} --cancel`"
    for target in ("b-2", ids[1]):
        with pytest.raises(
            Refused, match=words if target == ids[1] else "forgetting a part of this already"
        ):
            forget(central, target, accept_loss=True)
    assert order_state(central, order) == "planned"
    cancel_forget(central.journal, order, "tests")
    second = forget(central, "b-2", accept_loss=True)
    assert states(central, [late]) == ["forgotten"], "what came since goes with it"
    assert forget(central, "b-2", accept_loss=True) == second, "a repeat finds it"
    steps(central, second, clock, ("done",))
    assert states(central, ids) == ["merged", "forgotten", "merged"]


@pytest.mark.parametrize("end", ["cancel", "accept"])
def test_without_any_node_left_it_ends_when_the_operator_says_so(
    central: Central, end: str
) -> None:
    ids = release(central, 1)
    order = forget(central, "b-2")
    for node in NODES:
        revoke_node(central.journal, node, "tests")
    stop = lambda: order_state(central, order) not in ("ordered", "planned")  # noqa: E731
    loop = threading.Thread(
        target=take_steps, args=(central, make_settings(quorum=1), stop), daemon=True
    )
    loop.start()
    made = central.journal.wait(
        lambda state: any(plan.candidate for plan in state.open_plans("shared")), 20
    )
    assert made
    assert "waits for a node that could judge it: the cohort has none" in progress(
        told(central, order)
    )
    if end == "cancel":
        cancel_forget(central.journal, "b-2", "tests")
    else:
        cancel_forget(central.journal, "b-2", "tests")
        order = forget(central, "b-2", accept_loss=True)
    loop.join(20)
    assert not loop.is_alive()
    if end == "accept":
        take_steps(central, make_settings(quorum=1), lambda: order_state(central, order) == "done")
    assert states(central, ids) == (
        ["merged"] * 3 if end == "cancel" else ["merged", "forgotten", "merged"]
    )


def test_a_merge_under_way_without_judges_shows_in_the_order_behind_it(central: Central) -> None:
    release(central, 1)
    central.admit("a-1", make_increment(70), sequence=2)
    with answering(central.journal, lambda node: None):
        take_steps(
            central, make_settings(quorum=1, min_updates=1), asked(central, 2), clock=Clock(central)
        )
    order = forget(central, "b-2")
    words = progress(told(central, order))
    assert "is planned with the cohort's next merge; it waits for the verdict on v2-" in words
    assert "`central updates set-aside` takes it back" in words


def test_what_soaks_on_canary_is_rolled_back_and_not_cancelled(central: Central) -> None:
    release(central, 1)
    order = forget(central, "b-2")
    settings = make_settings().model_copy(update={"channels": ChannelSettings(first="canary")})
    take_steps(central, settings, lambda: len(line_states(central)) == 3)
    assert "waits for the canary v2-" in progress(told(central, order))
    with pytest.raises(
        Refused,
        match=r"accepted and soaks on canary.*"
        r"`central releases rollback --cohort shared --channel canary",
    ):
        cancel_forget(central.journal, order, "tests")
    assert forget(central, "b-2", accept_loss=True) == order, "there is nothing left to accept"


# The store.


@pytest.mark.parametrize("method", ["read", "put"])
def test_a_passing_trouble_of_the_store_is_tried_again(
    central: Central, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = release(central, 1)
    order = forget(central, "b-2")

    def failing(*_: object) -> bytes:
        raise StorageError("blobs/ab cannot be used: No space left on device.")

    with monkeypatch.context() as patched:
        patched.setattr(central.blobs, method, failing)
        for _ in range(2):  # as its thread starts the loop again (central/cohorts.py)
            with pytest.raises(StorageError):
                steps(central, order, Clock(central), ("done", "failed"))
    assert (order_state(central, order), states(central, ids)) == ("planned", ["merged"] * 3)
    words = progress(told(central, order, "blobs/ab cannot be used: No space left on device."))
    assert words.endswith(
        "it waits for what failed and is tried again: blobs/ab cannot be used: No space left on "
        "device."
    )
    with answering(central.journal, lambda node: ([result("acme")], "")):
        steps(central, order, Clock(central), ("done", "failed"))
    assert states(central, ids) == ["merged", "forgotten", "merged"]
    with central.journal.read() as state:
        assert len(state.plans) == 2


def test_a_store_that_has_nothing_at_all_is_away_and_has_not_lost_a_payload(
    central: Central, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = release(central, 1)
    order = forget(central, "b-2")
    with monkeypatch.context() as patched:  # a volume that is not mounted
        patched.setattr(central.blobs, "_root", Path("/nowhere"))
        with pytest.raises(BlobLost):
            steps(central, order, Clock(central), ("done", "failed"))
    assert order_state(central, order) == "planned"
    remove(central, ids[0])
    steps(central, order, Clock(central), ("done", "failed"))
    assert order_state(central, order) == "failed"


def test_a_strategy_that_makes_nothing_of_what_is_left_ends_the_order(
    central: Central, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = release(central, 1, strategy="FedMedian")
    order = forget(central, "b-2")

    def failing(*_: object) -> None:
        raise StrategyFailed("FedMedian failed on 2 update(s): tests.")

    monkeypatch.setattr(payload_module, "_merge", failing)
    steps(central, order, Clock(central), ("done", "failed"))
    assert (order_state(central, order), states(central, ids)) == ("failed", ["merged"] * 3)
    assert "FedMedian failed on 2" in told(central, order).verdict
