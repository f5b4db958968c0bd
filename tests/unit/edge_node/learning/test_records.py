from __future__ import annotations

from pathlib import Path

import pytest

from edge_node.learning.records import RoundPlan, RoundStore, open_starts, plan_round
from edge_node.settings import LearningSettings
from protos.manifest import Payload, ReleaseManifest


def make_release(version: int = 0) -> ReleaseManifest:
    return ReleaseManifest(
        base="0" * 64,
        cohort="shared",
        version=version,
        parent="1" * 64,
        plan="2" * 64,
        payload=Payload(digest_sha256="3" * 64, size_bytes=1),
        rank=16,
        truncation_error=0.0,
        updates=[],
        created_at="",
    )


def make_plan(
    number: int = 1, *, node: str = "a", version: int = 0, max_rank: int | None = None, seed: int = 0
) -> RoundPlan:
    return plan_round(
        LearningSettings(seed=seed),
        number=number,
        node_id=node,
        release=make_release(version),
        cursor=10 * number,
        max_rank=max_rank,
    )


def test_seed_depends_on_setting_node_and_number_only() -> None:
    seeds = {make_plan(n, node=node, seed=s).seed for n in (1, 2) for node in "ab" for s in (0, 1)}
    assert len(seeds) == 8
    assert make_plan(1, version=3).seed == make_plan(1, version=0).seed


def test_rate_decays_with_the_starts_version() -> None:
    assert make_plan(version=0).learning_rate == pytest.approx(5e-3)
    assert make_plan(version=3).learning_rate == pytest.approx(5e-3 * 0.7**3)


@pytest.mark.parametrize(("offer", "rank"), [(None, 8), (4, 4), (64, 8)])
def test_offer_may_lower_the_rank(offer: int | None, rank: int) -> None:
    assert make_plan(max_rank=offer).rank == rank


def test_round_is_durable_until_it_ends(tmp_path: Path) -> None:
    store = RoundStore(tmp_path / "learning")
    assert store.last() is None
    assert open_starts(tmp_path) == set()
    plan = make_plan()
    store.begin(plan)
    again = RoundStore(tmp_path / "learning")
    assert again.unfinished() == plan
    assert open_starts(tmp_path) == {plan.release_id}
    (again.workspace(plan.round_id) / "checkpoint-10").mkdir()
    again.finish(plan.round_id, "4" * 64)
    assert again.unfinished() is None
    assert again.last() == plan
    assert open_starts(tmp_path) == set()
    assert not (tmp_path / "learning/rounds" / plan.round_id).exists()


def test_one_round_at_a_time(tmp_path: Path) -> None:
    store = RoundStore(tmp_path)
    store.begin(make_plan(1))
    with pytest.raises(ValueError, match="is unfinished"):
        store.begin(make_plan(2))
    store.abandon(make_plan(1).round_id, "the release is gone")
    store.begin(make_plan(2))
    last = store.last()
    assert last is not None
    assert last.cursor == 20


def test_data_directory_that_has_never_learnt_stays_untouched(tmp_path: Path) -> None:
    assert open_starts(tmp_path) == set()
    assert not list(tmp_path.iterdir())
