"""A release whose blob is damaged or gone is made again from its plan, where that is possible."""

from __future__ import annotations

from pathlib import Path

import pytest

from central.blobs import BlobLost
from central.cohort.planning import PRODUCT_MEAN
from central.operators.forgetting import order_forget
from tests.contract.cohort_loop import (
    Central,
    answering,
    make_increment,
    make_settings,
    opened,
    result,
    take_steps,
)
from tests.contract.lost_blobs.damage import (
    DAMAGE,
    NODES,
    admit,
    blob_of,
    record,
    release_blob,
    version,
)


@pytest.mark.parametrize("strategy", [PRODUCT_MEAN, "FedAdam"])
@pytest.mark.parametrize("how", ["flipped", "deleted"])
def test_a_lost_release_is_made_again_from_its_plan(
    central: Central, strategy: str, how: str
) -> None:
    """Also what its strategy carries to the next merge."""
    settings = make_settings(min_updates=2, strategy=strategy)
    admit(central, 2)
    take_steps(central, settings, lambda: version(central) == 1)
    head = central.head()
    lost = [
        head.manifest.payload.digest_sha256,
        *([head.server_state] if head.server_state else []),
    ]
    whole = [central.blobs.read(digest) for digest in lost]
    for digest in lost:
        DAMAGE[how](central.blobs.path(digest), central.blobs.path(digest))
    later = [
        central.admit(node, make_increment(9 + n), sequence=2) for n, node in enumerate(NODES[:2])
    ]
    take_steps(central, settings, lambda: version(central) == 2)
    assert [central.blobs.read(digest) for digest in lost] == whole
    assert [record(central, u).state for u in later] == ["merged"] * 2


def test_a_release_that_cannot_be_made_again_blames_no_update(central: Central) -> None:
    ids = admit(central, 2)
    take_steps(central, make_settings(min_updates=2), lambda: version(central) == 1)
    blob_of(central, ids[0]).unlink()
    release_blob(central).unlink()
    later = [
        central.admit(node, make_increment(9 + n), sequence=2) for n, node in enumerate(NODES[:2])
    ]
    with pytest.raises(BlobLost, match="Restore the blobs from a backup"):
        take_steps(central, make_settings(min_updates=2), lambda: version(central) == 2)
    assert [record(central, u).state for u in later] == ["planned"] * 2


def test_a_candidate_that_is_lost_before_its_verdict_is_made_again(central: Central) -> None:
    admit(central, 2)
    candidates: list[str] = []

    def built() -> bool:
        with central.journal.read() as state:
            candidates[:] = [
                r.manifest.payload.digest_sha256
                for r in state.releases.values()
                if r.state == "candidate"
            ]
        return bool(candidates)

    settings = make_settings(quorum=1, min_updates=2)
    take_steps(central, settings, built)
    central.blobs.path(candidates[0]).unlink()
    with answering(central.journal, lambda node: ([result("acme")], "")):
        take_steps(central, settings, lambda: version(central) == 1)
    assert central.blobs.holds(candidates[0])


def test_a_candidate_that_is_lost_with_one_of_its_updates_is_given_up(central: Central) -> None:
    ids = admit(central)
    settings = make_settings(quorum=1, min_updates=2)

    def built() -> bool:
        with central.journal.read() as state:
            return any(release.state == "candidate" for release in state.releases.values())

    take_steps(central, settings, built)
    with central.journal.read() as state:
        candidate = next(r for r in state.releases.values() if r.state == "candidate")
    central.blobs.path(candidate.manifest.payload.digest_sha256).unlink()
    blob_of(central, ids[0]).unlink()
    with answering(central.journal, lambda node: ([result("acme")], "")):
        take_steps(central, settings, lambda: version(central) == 1)
    assert [record(central, u).state for u in ids] == ["set_aside", "merged", "merged"]


def test_a_lost_release_is_made_again_though_all_updates_of_the_plan_are_lost_too(
    central: Central,
) -> None:
    """The store's mark shows that it is there."""
    central.blobs.claim("this central")
    admit(central, 2)
    take_steps(central, make_settings(min_updates=2), lambda: version(central) == 1)
    later = central.admit("c-3", make_increment(9))
    head = release_blob(central)
    whole = head.read_bytes()
    blob_of(central, later).unlink()
    head.unlink()
    take_steps(
        central, make_settings(min_updates=1), lambda: record(central, later).state == "set_aside"
    )
    assert head.read_bytes() == whole


@pytest.mark.parametrize("how", ["flipped", "deleted"])
def test_a_removal_is_made_though_the_release_that_it_takes_from_is_lost(
    central: Central, how: str
) -> None:
    central.blobs.claim("this central")
    admit(central)
    take_steps(central, make_settings(min_updates=3), lambda: version(central) == 1)
    order_id = order_forget(central.journal, central.blobs, "b-2", False, "tests").order.order_id
    DAMAGE[how](release_blob(central), release_blob(central))

    def state() -> str:
        with central.journal.read() as found:
            return found.forgets[order_id].state

    take_steps(central, make_settings(), lambda: state() not in ("ordered", "planned"))
    assert state() == "done"


@pytest.mark.parametrize("of", ["shared", "acme"])
def test_a_composition_without_new_updates_makes_a_lost_release_again(
    tmp_path: Path, of: str
) -> None:
    settings = make_settings(min_updates=1)
    with opened(tmp_path, {"acme": "shared"}) as central:
        central.blobs.claim("this central")
        for number, (cohort, node) in enumerate((("shared", "s-1"), ("acme", "a-1"))):
            central.join(cohort, node)
            central.admit(node, make_increment(number), cohort)
        take_steps(central, settings, lambda: central.head("acme").manifest.version == 1, "acme")
        take_steps(
            central, settings, lambda: central.head("shared").manifest.version == 1, "shared"
        )
        lost = central.blobs.path(central.head(of).manifest.own_payload.digest_sha256)
        whole = lost.read_bytes()
        lost.unlink()
        take_steps(central, settings, lambda: central.head("acme").manifest.version == 2, "acme")
        assert lost.read_bytes() == whole
