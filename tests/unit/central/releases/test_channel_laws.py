"""Whatever operators do with the channels, every merged update is in exactly one release."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from central.blobs import DirectoryBlobs
from central.cohort.planning import plan_merge
from central.errors import Refused
from central.journal import Journal, State
from central.releases import Registry
from central.releases.canary import promotion
from central.settings import MergePolicy
from protos.lora import LoraTensors, encode
from protos.manifest import ReleaseManifest
from tests.unit.central import builders as make
from tests.unit.central.releases.test_registry import KEY

KINDS = [
    "learn on canary",
    "learn on stable",
    "promote",
    "take back",
    "set canary aside",
    "roll back",
    "pick",
]
STEPS = st.lists(st.sampled_from(KINDS), min_size=8, max_size=12)


@settings(max_examples=20, deadline=None)
@given(steps=STEPS, picks=st.lists(st.integers(0, 20), min_size=12, max_size=12))
def test_no_update_is_lost_or_counted_twice(steps: list[str], picks: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(f"sqlite:///{folder}/journal.db")
        registry = Registry(journal, DirectoryBlobs(Path(folder) / "blobs"), KEY, make.BASE)
        genesis = registry.ensure_cohort("shared").manifest
        journal.append(make.token_created(), make.node_enrolled())
        for number, (step, pick) in enumerate(zip(steps, picks, strict=False), start=1):
            try:
                take(step, pick, number, journal, registry, genesis)
            except Refused:
                pass  # a refusal changes nothing, and the laws hold after it too
            with journal.read() as state:
                expect_whole(state)
        journal.close()


def take(
    step: str,
    pick: int,
    number: int,
    journal: Journal,
    registry: Registry,
    genesis: ReleaseManifest,
) -> None:
    if step.startswith("learn"):
        journal.append(make.admitted(make.make_update(genesis, sequence=number)))
        with journal.read() as state:
            plan = plan_merge(state, "shared", MergePolicy(min_updates=1), make.AT)
            assert plan is None or state.soaking("shared") is None
        if plan is None:
            return
        plan = plan.model_copy(update={"seed": number})  # all plans here are of one time
        journal.append(make.planned(plan))
        candidate = registry.add_candidate(plan.digest, encode(LoraTensors()), 0.0)
        with journal.read() as state:
            event = promotion(
                state, state.releases[candidate.digest], step.rpartition(" ")[2], "gate"
            )
            journal.append(make.decided(candidate, True), event)
    elif step in ("promote", "pick"):
        with journal.read() as state:
            canary, every = state.head("shared", "canary"), list(state.releases)
        release = canary.release_id if canary and step == "promote" else every[pick % len(every)]
        registry.promote(release, "stable" if pick % 3 else "canary", "ops")
    elif step == "roll back":
        registry.rollback("shared", None, "requeue" if pick % 2 else "set_aside", "ops")
    else:
        registry.rollback(
            "shared", None, "requeue" if step == "take back" else "set_aside", "ops", "canary"
        )


def expect_whole(state: State) -> None:
    """The line ends in the canary while one soaks, and in stable otherwise."""
    end = state.soaking("shared") or state.head("shared")
    assert end is not None
    held = Counter(
        update for release in state.lineage(end.release_id) for update in release.manifest.updates
    )
    merged = {update.update_id for update in state.updates.values() if update.state == "merged"}
    assert held == Counter(merged)
    assert {update.state for update in state.updates.values()} <= {"merged", "waiting", "set_aside"}
    canary, stable = state.head("shared", "canary"), state.head("shared")
    assert canary is None or stable is None or state.descends(canary, stable), (
        "a canary is never behind stable"
    )
