"""Which release each environment of a candidate is compared with, on a real journal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from central.cohort.looks import high_water_releases
from central.journal import EvaluationRecord
from tests.contract.cohort_loop import Central, Reply, opened
from tests.contract.looks import BETTER, SAME, decide, measured, nodes_with, offers, settings


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        central.join("shared", "a-1", "b-2", "c-3")
        yield central


def test_candidates_are_compared_with_the_best_release_of_each_environment(
    central: Central,
) -> None:
    decide(central, nodes_with(both=BETTER, own_a=SAME), settings(20))
    best = central.head()
    base = best.manifest.parent
    decide(central, nodes_with(both=SAME, own_a=SAME), settings(20), 2)
    decide(central, nodes_with(both=SAME, own_a=SAME), settings(20), 3)
    assert central.head().manifest.version == 3
    with central.journal.read() as state:
        assert high_water_releases(state, "shared") == {"both": best.release_id, "own_a": base}
    last = offers(central)[-1]
    assert last.reference == central.head().manifest.parent
    assert last.references == {"both": best.release_id, "own_a": base}
    assert (
        "both: 32 -> 32 of 40 (only reference 0, only candidate 0, p 1) (against v1-"
        in central.head().verdict.text
    )  # type: ignore[union-attr]
    # An abandoned release is no reference any more; where it was the best, another is.
    central.registry.rollback("shared", base, "set_aside", "operator")
    with central.journal.read() as state:
        assert high_water_releases(state, "shared") == {}


def test_small_losses_within_the_tolerance_of_each_parent_do_not_add_up(central: Central) -> None:
    """Each candidate loses 5 points of its parent; one fixed release as reference shows this."""
    made = settings(400, tasks=400, tolerance_points=8)
    decide(central, nodes_with(own_a=BETTER), made)
    best = central.head().release_id
    texts = []
    for number in range(1, 4):
        loss = 20 * number  # of 400

        def losing(offer: EvaluationRecord, node: str, loss: int = loss) -> Reply:
            against_best = offer.compared_with("own_a") == best
            lost = loss if against_best else 20
            found = measured(offer, node, "own_a", (10, 0, 0, 0))
            return (
                ([{**found, "both_passed": 400 - lost, "only_reference_passed": lost}], "")
                if node == "a-1"
                else ([], "no")
            )

        texts.append(decide(central, losing, made, number + 1))
    assert [text.split(":")[0] for text in texts] == ["accepted", "rejected", "rejected"]


def test_nodes_that_cannot_load_the_best_release_are_heard_against_the_parent(
    central: Central,
) -> None:
    decide(central, nodes_with(own_a=BETTER, both=BETTER), settings(20))
    best = central.head()
    decide(central, nodes_with(own_a=SAME, both=SAME), settings(20), 2)
    parent = central.head()
    answer = nodes_with(both=SAME, own_a=SAME)

    def without(offer: EvaluationRecord, node: str) -> Reply:
        results, reason = answer(offer, node)
        if node == "a-1":
            results = [
                {**found, "reference_id": offer.reference, "fallback_reason": "rank 9 is too much"}
                for found in results
            ]
        return results, reason

    text = decide(central, without, settings(20), 3)
    label = parent.manifest.label
    # own_a is measured at node a alone; of both, node b's comparison with the best release counts.
    assert (
        f"own_a: 16 -> 16 of 20 (only reference 0, only candidate 0, p 1) (against {label}" in text
    )
    assert "not against its high-water release, because rank 9 is too much" in text
    assert (
        "both: 16 -> 16 of 20 (only reference 0, only candidate 0, p 1) (against "
        f"{best.manifest.label}" in text
    )
    with central.journal.read() as state:
        assert set(high_water_releases(state, "shared").values()) == {best.release_id}
