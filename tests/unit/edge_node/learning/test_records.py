from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from edge_node.errors import SettingsError, StorageError
from edge_node.learning.feedback_plan import GroupSizes
from edge_node.learning.plans import RoundPlan, WarmPlan, plan_round
from edge_node.learning.policy import Method
from edge_node.learning.records import RoundStore, open_starts
from edge_node.settings import LearningSettings
from protos.manifest import Payload, ReleaseManifest, sha256_hex

METHODS: tuple[Method, ...] = ("sft", "dpo", "scored", "kto", "grpo")


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
    number: int = 1,
    *,
    node: str = "a",
    version: int = 0,
    max_rank: int | None = None,
    seed: int = 0,
    method: Method = "sft",
    groups: GroupSizes | None = None,
) -> RoundPlan:
    return plan_round(
        LearningSettings(seed=seed),
        number=number,
        node_id=node,
        release=make_release(version),
        cursor=10 * number,
        max_rank=max_rank,
        method=method,
        groups=groups,
    )


def test_seed_depends_on_setting_node_and_number_only() -> None:
    seeds = {make_plan(n, node=node, seed=s).seed for n in (1, 2) for node in "ab" for s in (0, 1)}
    assert len(seeds) == 8
    assert make_plan(1, version=3).seed == make_plan(1, version=0).seed


def test_a_plan_names_the_bases_own_samples(tmp_path: Path) -> None:
    def plan(**learning: Any) -> RoundPlan:
        settings = LearningSettings(anchors=tmp_path / "anchors", **learning)
        return plan_round(
            settings, number=1, node_id="a", release=make_release(), cursor=0, max_rank=None
        )

    with pytest.raises(SettingsError, match=r"there are no anchors in .*: No such file"):
        plan()
    assert plan(batch_anchor=0).anchors is None, "a batch without anchors needs none"
    (tmp_path / "anchors").mkdir()
    (tmp_path / "anchors/anchors.json").write_bytes(b"x")
    made = plan(kl=0.5)
    assert (made.anchors, made.kl) == (sha256_hex(b"x"), 0.5)
    assert (make_plan().anchors, make_plan().kl) == (None, 1.0)


def test_rate_decays_with_the_starts_version() -> None:
    assert make_plan(version=0).learning_rate == pytest.approx(5e-3)
    assert make_plan(version=3).learning_rate == pytest.approx(5e-3 * 0.7**3)


def test_a_plan_has_a_warm_start_only_where_one_is_wanted() -> None:
    def plan(cursor: int | None, **grpo: Any) -> RoundPlan:
        settings = LearningSettings.model_validate({"grpo": grpo, "learning_rate": 0.1})
        return plan_round(
            settings, number=1, node_id="a", release=make_release(2), cursor=0, max_rank=None,
            method="grpo", explored=["sums"], warm_cursor=cursor,
        )  # fmt: skip

    for without in (plan(None), plan(7, warm_steps=0)):
        assert without.grpo is not None
        assert without.grpo.warm is None
        assert b"warm" not in without.to_bytes(), "older software reads such a plan"
    made = plan(7, warm_steps=5)
    assert made.grpo is not None
    assert made.grpo.warm == WarmPlan(steps=5, learning_rate=0.1 * 0.7**2, cursor=7)
    assert RoundPlan.model_validate_json(made.to_bytes()) == made


@pytest.mark.parametrize(("offer", "rank"), [(None, 8), (4, 4), (64, 8)])
def test_offer_may_lower_the_rank(offer: int | None, rank: int) -> None:
    assert make_plan(max_rank=offer).rank == rank


def test_what_an_unfinished_round_reads_is_known(tmp_path: Path) -> None:
    store = RoundStore(tmp_path)
    assert store.reads() == 0
    plan = make_plan()
    store.begin(plan)
    assert RoundStore(tmp_path).reads() == plan.cursor > 0
    store.finish(plan.round_id, "update")
    assert store.reads() == 0


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


def test_a_plan_of_before_a_field_was_added_is_read(tmp_path: Path) -> None:
    """Otherwise a node that is upgraded in the middle of a round never learns again."""
    store = RoundStore(tmp_path)
    plan = make_plan().model_copy(update={"dtype": "bfloat16", "target_modules": "attention"})
    store.begin(plan)
    document = json.loads(plan.to_bytes())
    del document["dtype"], document["target_modules"]
    with sqlite3.connect(tmp_path / "rounds.db") as database:
        database.execute("UPDATE rounds SET plan = ?", (json.dumps(document).encode(),))
    before = plan.model_copy(update={"dtype": "float32", "target_modules": "all-linear"})
    assert store.unfinished() == store.last() == before


def test_a_plan_of_a_newer_version_is_a_clear_error_and_its_release_is_kept(tmp_path: Path) -> None:
    store = RoundStore(tmp_path / "learning")
    store.begin(make_plan())
    newer = json.loads(make_plan().to_bytes()) | {"schema_version": 2, "dreams": 3}
    with sqlite3.connect(tmp_path / "learning" / "rounds.db") as database:
        database.execute("UPDATE rounds SET plan = ?", (json.dumps(newer).encode(),))
    for read in (store.unfinished, store.last, store.ends):
        with pytest.raises(StorageError, match=r"cannot read: schema_version: .* newer version"):
            read()
    workspace = store.workspace(make_plan().round_id)
    store.clear_workspaces()
    assert workspace.is_dir()
    assert open_starts(tmp_path) == {make_plan().release_id}


def test_a_plan_without_replay_has_the_bytes_of_before(tmp_path: Path) -> None:
    plan = plan_round(
        LearningSettings(batch_replay=0), number=1, node_id="a", release=make_release(0), cursor=0,
        max_rank=None,
    )  # fmt: skip
    assert not {"batch_replay", "deleted"} & plan.model_dump().keys()
    assert make_plan().batch_replay == 4


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


def test_each_method_has_a_cursor_of_its_own(tmp_path: Path) -> None:
    """What preferences say is not read by a round of corrections."""
    store, last = RoundStore(tmp_path), {}
    for number, method in enumerate(("sft", "dpo", "sft", "kto", "dpo", "kto"), 1):
        plan = make_plan(number, method=method)
        assert (plan.method, "feedback" in json.loads(plan.to_bytes())) == (method, method != "sft")
        store.begin(plan)
        store.finish(plan.round_id, "4" * 64)
        last[method] = plan.cursor
    assert store.cursors() == {**last, "grpo": 0, "scored": 0}
    assert store.sent(make_plan(1).release_id) == {"sft", "dpo", "kto"}
    assert store.sent("another") == set()


def test_a_scored_round_meets_each_group_four_times_at_most() -> None:
    sizes = GroupSizes(count=8, samples=5, tokens=9, stale=2)
    plan = make_plan(method="scored", groups=sizes)
    assert plan.steps == 2, "32 turns of groups, 16 a step"
    assert plan.grpo is not None
    assert (plan.grpo.samples, plan.grpo.temperature, plan.grpo.environments) == (5, 1.0, [])
    assert plan.feedback is not None
    assert plan.feedback.stale == 2
    many = GroupSizes(count=1000, samples=5, tokens=9, stale=0)
    assert make_plan(method="scored", groups=many).steps == 40


def test_a_dropped_round_took_nothing_and_counts_as_no_try(tmp_path: Path) -> None:
    """Its update would have been of no use; what it was to learn from is still new."""
    store = RoundStore(tmp_path)
    ends = {1: store.finish, 2: store.drop, 3: store.give_up, 4: store.drop}
    methods: dict[int, Method] = {1: "sft", 2: "sft", 3: "grpo", 4: "dpo"}
    for number, end in ends.items():
        plan = make_plan(number, method=methods[number])
        if number == 3:  # as the worker plans it
            plan = plan.model_copy(update={"cursor": store.cursors()["sft"]})
        store.begin(plan)
        end(plan.round_id, "after step 1 of 2")
    assert store.cursors() == {"sft": 10, "dpo": 0, "scored": 0, "kto": 0, "grpo": 0}
    assert store.given_up(make_plan().release_id) == 1
    assert store.ends()[0].result == "obsolete after step 1 of 2"


def test_only_grpo_rounds_are_tries_of_a_release(tmp_path: Path) -> None:
    """A round of another method that the local gate stopped says nothing about the verifiers."""
    store = RoundStore(tmp_path)
    for number, method in enumerate(METHODS, 1):
        plan = make_plan(number, method=method)
        store.begin(plan)
        store.give_up(plan.round_id, "the local gate stops it")
    assert store.given_up(make_plan().release_id) == 1
