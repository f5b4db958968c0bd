"""When a merge is planned, and what the plan says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from central.cohort.planning import plan_merge
from central.journal import Journal
from central.settings import MergePolicy
from tests.unit.central.builders import (
    AT,
    admitted,
    built,
    decided,
    make_candidate,
    make_plan,
    make_update,
    planned,
    promoted,
    start_cohort,
)

LATER = "2026-11-22T12:14:59.000000Z"
MUCH_LATER = "2026-11-22T12:15:00.000000Z"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(f"sqlite:///{tmp_path}/journal.db", clock=lambda: AT)
    yield journal
    journal.close()


def test_waits_for_the_number_of_updates_and_gives_equal_weights(journal: Journal) -> None:
    genesis = start_cohort(journal, nodes=("a-00000000", "b-00000000"))
    first, second = make_update(genesis), make_update(genesis, "b-00000000", experiences=10_000)
    journal.append(admitted(first))
    policy = MergePolicy(min_updates=2, max_age_s=900, rank=7, server_step=1.5, seed=3)
    with journal.read() as state:
        assert plan_merge(state, "shared", policy, LATER) is None
    journal.append(admitted(second))
    with journal.read() as state:
        plan = plan_merge(state, "shared", policy, LATER)
    assert plan is not None
    assert [update.update_id for update in plan.updates] == [first.digest, second.digest]
    assert [update.weight for update in plan.updates] == [0.5, 0.5]
    assert (plan.parent, plan.version, plan.rank, plan.server_step, plan.seed) == (
        genesis.digest,
        1,
        7,
        1.5,
        3,
    )
    assert plan.created_at == LATER


def test_an_old_update_is_merged_alone(journal: Journal) -> None:
    genesis = start_cohort(journal)
    journal.append(admitted(make_update(genesis)))
    policy = MergePolicy(min_updates=2, max_age_s=900)
    with journal.read() as state:
        assert plan_merge(state, "shared", policy, LATER) is None
        plan = plan_merge(state, "shared", policy, MUCH_LATER)
    assert plan is not None
    assert [update.weight for update in plan.updates] == [1.0]


def test_a_stock_strategy_gets_updates_of_one_start_only(journal: Journal) -> None:
    genesis = start_cohort(journal, nodes=("a-00000000", "b-00000000", "c-00000000"))
    old = make_update(genesis)
    plan = make_plan(genesis, old)
    candidate = make_candidate(plan)
    journal.append(
        admitted(old),
        planned(plan),
        built(candidate),
        decided(candidate, True),
        promoted(candidate),
    )
    stale = make_update(genesis, "c-00000000")
    fresh = [make_update(candidate, node, 2) for node in ("a-00000000", "b-00000000")]
    journal.append(admitted(stale), *(admitted(update) for update in fresh))
    with journal.read() as state:
        stock = plan_merge(state, "shared", MergePolicy(min_updates=2, strategy="FedAvg"), AT)
        ours = plan_merge(state, "shared", MergePolicy(min_updates=2), AT)
    assert stock is not None
    assert ours is not None
    assert [update.update_id for update in stock.updates] == [update.digest for update in fresh]
    assert [update.update_id for update in ours.updates] == [
        stale.digest,
        *(update.digest for update in fresh),
    ]
    assert ours.parent == stock.parent == candidate.digest
