"""What vLLM serves is the release, or it is said what it is instead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_node.proof.distance import (
    MOST_QUANTISED,
    Reference,
    Served,
    Values,
    measure,
    wrong,
)

ROWS, TOKENS = 8, 144
COLUMNS = TOKENS - 1
FOLLOWING = [{7: -0.5, 8: -1.5, 9: -3.0}] * ROWS
GENERATOR = np.random.default_rng(0)
BASE = GENERATOR.normal(-5, 1, (ROWS, COLUMNS)).astype(np.float32)
DIRECTION = GENERATOR.choice([-1.0, 1.0], (2, ROWS, COLUMNS)).astype(np.float32)


def rounded(values: Values, by: float = 0.004) -> Values:
    noise = np.random.default_rng(1).normal(0, by, values.shape)
    return (values + noise).astype(np.float32)


def reference(apart: float) -> Reference:
    return Reference(
        prompts=[[1] * TOKENS] * ROWS,
        release=BASE + np.float32(apart) * DIRECTION[0],
        base=BASE,
    )


def served(release: Values, *, base: Values = BASE, before: Values | None = None) -> Served:
    return Served(rounded(release), rounded(base), before, list(FOLLOWING), list(FOLLOWING))


def verdict(known: Reference, answers: Served) -> str | None:
    return wrong(measure(known, answers))


@pytest.mark.parametrize("apart", [0.0, 0.02, 0.5, 5.0])
def test_a_release_that_is_served_with_rounding_passes(apart: float) -> None:
    known = reference(apart)
    assert verdict(known, served(known.release)) is None


def test_the_rounding_of_a_quantised_base_is_allowed_for_the_release_too() -> None:
    known = reference(1.0)
    answers = replace(
        served(known.release), release=rounded(known.release, 0.1), base=rounded(BASE, 0.1)
    )
    assert verdict(known, answers) is None


def test_the_base_in_place_of_the_release_is_named() -> None:
    known = reference(0.1)
    assert verdict(known, served(known.base)) == "it answers as the base does"


def test_the_version_before_in_place_of_the_release_is_named() -> None:
    known = reference(0.5)
    before = BASE + 0.6 * DIRECTION[1]
    answers = served(before, before=rounded(before))
    assert verdict(known, answers) == "it answers as the version before it does"


def test_the_base_in_place_of_the_release_is_named_beside_a_version_before() -> None:
    """The base lies half-way from a version before that goes the other way."""
    known = reference(0.5)
    before = BASE - (known.release - BASE)
    answers = served(BASE, before=rounded(before))
    assert verdict(known, answers) == "it answers as the base does"


def test_a_version_before_that_is_near_is_told_too() -> None:
    """A release is a small step from the one before: their way from the base is the same."""
    known = reference(0.5)
    before = known.release + np.float32(0.05) * DIRECTION[1]
    assert verdict(known, served(known.release, before=rounded(before))) is None
    answers = served(before, before=rounded(before))
    assert verdict(known, answers) == "it answers as the version before it does"


@pytest.mark.parametrize("scale", [0.5, 0.75, 2.0, -1.0])
@pytest.mark.parametrize("apart", [0.05, 0.5])
def test_a_wrong_scale_is_found(scale: float, apart: float) -> None:
    known = reference(apart)
    release = BASE + np.float32(scale) * (known.release - BASE)
    assert f"it goes {scale:.2f} of the way" in (verdict(known, served(release)) or "")


def test_answers_that_go_astray_on_the_right_way_are_found() -> None:
    known = reference(0.5)
    astray = known.release + np.float32(0.3) * DIRECTION[1] * np.sign(known.release.mean())
    assert "nats a token from the release's" in (verdict(known, served(astray)) or "")


def test_another_base_is_named_also_where_it_is_not_a_number() -> None:
    known = reference(0.5)
    other = BASE + DIRECTION[1]
    assert "is not the base" in (verdict(known, served(known.release, base=other)) or "")
    lost = np.full_like(BASE, np.nan)
    assert "is not the base" in (verdict(known, served(known.release, base=lost)) or "")


@pytest.mark.parametrize(
    "stale", [{7: -1.5, 8: -0.5, 9: -3.0}, {17: -0.1, 18: -2.5, 19: -4.0}, {7: -0.1, 8: -2.5}]
)
def test_one_stale_answer_from_the_prefix_cache_is_found(stale: dict[int, float]) -> None:
    known = reference(0.5)
    answers = served(known.release)
    answers.cached[2] = stale
    assert "prefix cache" in (verdict(known, answers) or "")


def test_the_least_likely_token_may_be_another_one() -> None:
    known = reference(0.5)
    answers = served(known.release)
    answers.cached[2] = {7: -0.502, 8: -1.498, 10: -3.001}
    assert verdict(known, answers) is None


def test_a_base_that_vllm_quantises_may_be_further_from_its_reference() -> None:
    known = reference(2.0)
    answers = replace(
        served(known.release), release=rounded(known.release, 0.4), base=rounded(BASE, 0.4)
    )
    distances = measure(known, answers)
    assert "is not the base" in (wrong(distances) or "")
    assert wrong(distances, MOST_QUANTISED) is None


def test_releases_that_are_too_near_to_tell_are_said_to_be() -> None:
    known = reference(0.001)
    assert not measure(known, served(known.release)).tells
    known = reference(0.0)
    assert not measure(known, served(known.release)).tells
    known = reference(0.5)
    assert measure(known, served(known.release)).tells
    near = rounded(known.release)
    assert not measure(known, served(known.release, before=near)).tells
