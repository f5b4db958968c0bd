"""Cohorts that build on shared, through the real loop: composition and barrier."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from central.cli import main
from central.cohort.planning import plan_merge
from central.cohort.strategies.moments import ServerState
from central.journal import Event, EventKind, NewEvent, ReleaseRecord
from central.settings import CentralSettings
from protos.lora import decode
from tests.contract.cohort_loop import (
    KEY,
    NAMES,
    Central,
    answering,
    dense,
    make_increment,
    make_settings,
    opened,
    result,
    take_steps,
)
from tests.contract.test_releases_verify import write_key
from tests.unit.central.builders import AT

RANK = 8
SETTINGS = make_settings(min_updates=1, rank=RANK)


@pytest.fixture
def central(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Central]:
    monkeypatch.setenv("CENTRAL_DATA_DIR", str(tmp_path))
    write_key(tmp_path, KEY)
    with opened(tmp_path, {"acme": "shared", "beta": "shared"}) as running:
        running.join("shared", "s-1")
        running.join("acme", "a-1")
        running.join("beta", "b-1")
        yield running


def learn(
    central: Central, cohort: str, seed: int, settings: CentralSettings = SETTINGS
) -> ReleaseRecord:
    """One node's update on the cohort's head, merged."""
    before = central.head(cohort)
    node = {"shared": "s-1", "acme": "a-1", "beta": "b-1"}[cohort]
    central.admit(node, make_increment(seed), cohort, seed)
    take_steps(central, settings, lambda: seed in merged(central, cohort), cohort)
    assert central.head(cohort) != before
    return central.head(cohort)


def compose(central: Central, cohort: str, settings: CentralSettings = SETTINGS) -> ReleaseRecord:
    """The composition that is due."""
    before = central.head(cohort)
    take_steps(central, settings, lambda: central.head(cohort) != before, cohort)
    return central.head(cohort)


def merged(central: Central, cohort: str) -> set[int]:
    with central.journal.read() as state:
        return {
            u.manifest.sequence
            for u in state.updates.values()
            if u.cohort == cohort and u.state == "merged"
        }


def due(central: Central, cohort: str) -> bool:
    with central.journal.read() as state:
        return plan_merge(state, cohort, SETTINGS.merge.policy(cohort), AT) is not None


def own(central: Central, release: ReleaseRecord, name: str) -> np.ndarray:
    return dense(decode(central.blobs.read(release.manifest.own_payload.digest_sha256)), name)


def truncated(product: np.ndarray, rank: int = RANK) -> np.ndarray:
    u, s, vt = np.linalg.svd(product)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def events(central: Central, cohort: str) -> list[Event]:
    return [event for event in central.journal.events() if event.cohort == cohort]


def test_what_is_served_is_shared_and_the_own_chain_together(central: Central) -> None:
    assert not due(central, "acme"), "shared has learnt nothing yet"
    first_own = learn(central, "acme", 1)
    shared = learn(central, "shared", 2)
    composed = compose(central, "acme")
    assert not due(central, "acme")
    second_own = learn(central, "acme", 3)
    newer = learn(central, "shared", 4)
    last = compose(central, "acme")
    assert [release.manifest.version for release in (first_own, composed, second_own, last)] == [
        1,
        2,
        3,
        4,
    ]
    assert composed.manifest.updates == last.manifest.updates == []
    for name in NAMES:
        one, two = (dense(make_increment(seed), name) for seed in (1, 3))
        np.testing.assert_allclose(own(central, composed, name), one, atol=1e-4)
        np.testing.assert_allclose(own(central, last, name), one + two, atol=1e-4)
        for release, base in ((composed, shared), (second_own, shared), (last, newer)):
            total = central.product(base, name) + own(central, release, name)
            np.testing.assert_allclose(central.product(release, name), truncated(total), atol=1e-3)
    composition = last.manifest.composition
    assert composition is not None
    assert composition.builds_on == newer.release_id
    assert composition.own == second_own.manifest.own_payload
    assert last.manifest.truncation_error > 0, "rank 14 does not fit into 8"


def test_a_rejected_composition_keeps_the_older_base_and_is_tried_again_when_the_chain_moves(
    central: Central,
) -> None:
    older = learn(central, "shared", 1)
    kept = compose(central, "acme")
    newer = learn(central, "shared", 2)
    gated = make_settings(quorum=1, min_updates=1, rank=RANK)
    bad = [result("acme", both=2, b=18, c=0, neither=0)]
    with answering(central.journal, lambda node: (bad, "")):
        take_steps(central, gated, lambda: rejections(central) == 1, "acme")
    assert central.head("acme") == kept
    assert not due(central, "acme"), "the same two are not tried twice"
    moved = learn(central, "acme", 3)
    assert base(moved) == older.release_id, (
        "a merge keeps the base that this cohort could work with"
    )
    assert base(compose(central, "acme")) == newer.release_id


def rejections(central: Central) -> int:
    with central.journal.read() as state:
        return sum(release.state == "rejected" for release in state.releases.values())


def base(release: ReleaseRecord) -> str:
    assert release.manifest.composition is not None
    return release.manifest.composition.builds_on


def test_after_a_rollback_of_its_base_the_release_stays_and_the_next_is_on_the_new_head(
    central: Central,
) -> None:
    older = learn(central, "shared", 1)
    newer = learn(central, "shared", 2)
    served = compose(central, "acme")
    central.registry.rollback("shared", None, "set_aside", "ops")
    assert central.head("acme") == served
    assert base(served) == newer.release_id
    assert base(compose(central, "acme")) == older.release_id


def test_a_composition_with_a_release_that_is_rolled_back_meanwhile_is_cancelled(
    central: Central,
) -> None:
    learn(central, "shared", 1)
    gated = make_settings(quorum=1, min_updates=1, rank=RANK)
    take_steps(central, gated, lambda: candidate(central, "acme"), "acme")
    central.registry.rollback("shared", None, "requeue", "ops")
    with central.journal.read() as state:
        assert not state.open_plans("acme")
        assert [
            r.verdict.text for r in state.releases.values() if r.state == "rejected" and r.verdict
        ] == ["cancelled: the release that it builds on was rolled back"]


def candidate(central: Central, cohort: str) -> bool:
    with central.journal.read() as state:
        return any(r.cohort == cohort and r.state == "candidate" for r in state.releases.values())


def test_what_shared_forgets_is_in_no_release_that_is_made_afterwards(central: Central) -> None:
    learn(central, "shared", 1)
    compose(central, "acme")
    with central.journal.read() as state:
        updates = [
            update.update_id for update in state.updates.values() if update.cohort == "shared"
        ]
    body = {"node_id": "s-1", "updates": updates, "accept_loss": True, "by": "ops"}
    central.journal.append(NewEvent(EventKind.FORGET_ORDERED, "shared", "0" * 64, body))
    without = compose(central, "shared")
    gated = make_settings(quorum=1, min_updates=1, rank=RANK)
    bad = [result("acme", both=2, b=18, c=0, neither=0)]
    with answering(central.journal, lambda node: (bad, "")):
        take_steps(central, gated, lambda: rejections(central) == 1, "acme")
    moved = learn(central, "acme", 2)
    assert base(moved) == without.release_id, "whatever the gate said of the composition"
    for name in NAMES:
        np.testing.assert_allclose(
            central.product(moved, name), dense(make_increment(2), name), atol=1e-4
        )


def test_a_composition_carries_a_strategys_state_on_and_hands_it_to_no_other_strategy(
    central: Central,
) -> None:
    adam, yogi = (
        make_settings(min_updates=1, rank=RANK, strategy=name) for name in ("FedAdam", "FedYogi")
    )

    def merges(release: ReleaseRecord) -> int:
        return ServerState.from_bytes(central.blobs.read(release.server_state or "")).merges

    first = learn(central, "acme", 1, adam)
    learn(central, "shared", 2)
    assert compose(central, "acme", yogi).server_state == first.server_state
    assert merges(learn(central, "acme", 3, adam)) == 2, "it goes on"
    learn(central, "shared", 4)
    compose(central, "acme", yogi)
    assert merges(learn(central, "acme", 5, yogi)) == 1, "it starts afresh"


def test_nothing_of_a_private_cohort_is_known_to_shared_or_to_another_one(central: Central) -> None:
    learn(central, "shared", 1)
    for cohort, seed in (("acme", 2), ("beta", 3)):
        compose(central, cohort)
        learn(central, cohort, seed)
    before = central.head()
    with central.journal.read() as state:
        assert plan_merge(state, "shared", SETTINGS.merge, AT) is None
        private = {name: known(state, name) for name in ("acme", "beta")}
    learn(central, "shared", 4)
    for cohort, own_ids in private.items():
        for other in {"shared", "acme", "beta"} - {cohort}:
            text = json.dumps([[e.kind, e.subject, dict(e.body)] for e in events(central, other)])
            assert not [found for found in own_ids if found in text], f"{other} knows of {cohort}"
    for name in NAMES:
        added = central.product(central.head(), name) - central.product(before, name)
        np.testing.assert_allclose(added, dense(make_increment(4), name), atol=1e-3)


def known(state: object, cohort: str) -> set[str]:
    """Ids of the cohort's releases, updates and nodes, and digests of its payloads."""
    releases = [r for r in state.releases.values() if r.cohort == cohort]  # type: ignore[attr-defined]
    updates = [u for u in state.updates.values() if u.cohort == cohort]  # type: ignore[attr-defined]
    learnt = [r for r in releases if r.manifest.updates]
    return {
        *(r.release_id for r in releases),
        *(
            p
            for r in learnt
            for p in (r.manifest.payload.digest_sha256, r.manifest.own_payload.digest_sha256)
        ),
        *(
            i
            for u in updates
            for i in (u.update_id, u.manifest.node_id, u.manifest.payload.digest_sha256)
        ),
    }


def test_verify_rebuilds_composed_releases_and_finds_what_was_altered(
    central: Central, capsys: pytest.CaptureFixture[str]
) -> None:
    learn(central, "acme", 1)
    learn(central, "shared", 2)
    compose(central, "acme")
    last = learn(central, "acme", 3)
    assert verify(last.manifest.label, "--deep", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["cohort"], row["version"][:2], row["outcome"]) for row in rows] == [
        ("shared", "v0", "identical"),
        ("acme", "v0", "identical"),
        ("acme", "v1", "identical"),
        ("shared", "v1", "identical"),
        ("acme", "v2", "identical"),
        ("acme", "v3", "identical"),
    ]
    # The chain and the served release are rebuilt from updates, and what is stored is read too.
    for payload in (last.manifest.payload, last.manifest.own_payload):
        path = central.blobs.path(payload.digest_sha256)
        kept = path.read_bytes()
        path.unlink()
        assert verify(last.release_id, "--deep", "--json") == 1
        row = json.loads(capsys.readouterr().out)[-1]
        assert (row["outcome"], row["rebuilt"]) == ("damaged", row["expected"])
        path.write_bytes(kept)
    assert verify(last.release_id, "--deep") == 0
    capsys.readouterr()
    update = last.manifest.updates[0]
    with central.journal.read() as state:
        path = central.blobs.path(state.updates[update].manifest.payload.digest_sha256)
    path.write_bytes(b"altered")
    assert verify(last.release_id) == 1


def verify(*arguments: str) -> object:
    with pytest.raises(SystemExit) as caught:
        main(["releases", "verify", *arguments])
    return caught.value.code


def test_a_replayed_journal_says_the_same_and_the_cohort_stays_what_it_was(
    central: Central, tmp_path: Path
) -> None:
    learn(central, "shared", 1)
    compose(central, "acme")
    central.journal.close()
    with (
        opened(tmp_path) as again,
        again.journal.read() as state,
    ):  # the setting is gone: the journal knows
        assert state.builds_on == {"acme": "shared", "beta": "shared"}
        assert base(again.head("acme")) == again.head().release_id
        assert again.registry.ensure_cohort("acme") == state.genesis("acme")
