"""The figures of continual learning, on matrices that can be checked by hand."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from central.gate.continual import Continual, Course, Fall, Row, continual, pass_hat_k

THREE: list[Row] = [
    {"a": 0.1, "b": 0.2, "c": 0.0},
    {"a": 0.9, "b": 0.4, "c": 0.1},
    {"a": 0.7, "b": 0.8, "c": 0.3},
    {"a": 0.8, "b": 0.6, "c": 0.7},
]
"""Three environments, learnt one after the other."""
LEARNT = {"a": 1, "b": 2, "c": 3}


def test_they_are_those_of_the_papers() -> None:
    found = continual(THREE, LEARNT)
    assert found.environments == 3
    assert found.average == pytest.approx((0.8 + 0.6 + 0.7) / 3)
    assert found.backward_transfer == pytest.approx(((0.8 - 0.9) + (0.6 - 0.8)) / 2)
    assert found.forward_transfer == pytest.approx(((0.4 - 0.2) + (0.3 - 0.0)) / 2)
    assert found.forgetting == pytest.approx(((0.9 - 0.8) + (0.8 - 0.6)) / 2)
    assert found.worst == Fall("b", 0.8, 0.6)


def test_an_earlier_release_has_the_figures_of_its_own_time() -> None:
    found = continual(THREE[:3], LEARNT)
    assert found.average == pytest.approx((0.7 + 0.8 + 0.3) / 3)
    assert found.backward_transfer == pytest.approx(0.7 - 0.9)
    # b was learnt now, c by nobody yet: both are better than the base was.
    assert found.forward_transfer == pytest.approx(((0.4 - 0.2) + (0.3 - 0.0)) / 2)
    assert found.worst == Fall("a", 0.9, 0.7)


def test_forgetting_looks_at_the_best_and_backward_transfer_at_the_first() -> None:
    rows: list[Row] = [{"a": 0.0}, {"a": 0.5}, {"a": 0.9}, {"a": 0.6}]
    found = continual(rows, {"a": 1})
    assert found.backward_transfer == pytest.approx(0.1)
    assert found.forgetting == pytest.approx(0.3)
    better = continual([*rows, {"a": 1.0}], {"a": 1})
    assert better.forgetting == pytest.approx(-0.1), "better than ever"


def test_what_the_base_could_do_can_be_forgotten_by_the_first_release() -> None:
    found = continual([{"anchor": 0.9, "a": 0.3}, {"anchor": 0.7, "a": 0.2}], {"anchor": 0, "a": 1})
    assert found.forgetting == found.worst.best - 0.7 == pytest.approx(0.2)  # type: ignore[union-attr]
    assert found.forward_transfer is None, "the first environment has no release before it"


def test_what_nobody_learns_is_forward_transfer_alone() -> None:
    found = continual([{"c": 0.1}, {"c": 0.4}, {"c": 0.2}], {})
    assert (found.backward_transfer, found.forgetting, found.worst) == (None, None, None)
    assert found.forward_transfer == pytest.approx(0.1)


def test_what_was_not_measured_is_left_out() -> None:
    rows: list[Row] = [{"a": 0.1}, {"a": None}, {"a": 0.6, "b": 0.5}, {"a": None}, {"a": 0.4}]
    found = continual(rows, {"a": 1, "b": 2})
    assert (found.environments, found.average) == (1, 0.4)
    assert found.backward_transfer == pytest.approx(0.4 - 0.6), "first measured in row 2"
    assert continual(rows[:4], {"a": 1, "b": 2}) == Continual(0, None, None, None, None, None)
    # Without the base's row, and without one before it was learnt.
    assert continual([{}, {"a": 0.2}, {"a": 0.3}], {"a": 2}).forward_transfer is None
    assert continual([{"a": 0.2}, {}, {"a": 0.3}], {"a": 2}).forward_transfer is None
    with pytest.raises(ValueError, match="no row"):
        continual([], {})


ROWS = st.integers(1, 4).flatmap(
    lambda count: st.lists(
        st.fixed_dictionaries(
            {
                f"e{number}": st.none() | st.integers(0, 10).map(lambda n: n / 10)
                for number in range(count)
            }
        ),
        min_size=1,
        max_size=7,
    )
)


@given(ROWS, st.dictionaries(st.sampled_from(["e0", "e1", "e2", "e3"]), st.integers(0, 7)))
def test_laws(rows: list[Row], learnt: dict[str, int]) -> None:
    found = continual(rows, learnt)
    values = [value for value in rows[-1].values() if value is not None]
    assert found.average == (pytest.approx(sum(values) / len(values)) if values else None)
    if found.forgetting is not None:
        assert found.backward_transfer is not None
        assert found.forgetting >= -found.backward_transfer - 1e-9, (
            "the best is not below the first"
        )
    assert (found.worst is None) == (found.forgetting is None)
    for name, value in rows[-1].items():
        begun = learnt.get(name)
        if value is not None and begun is not None and begun < len(rows) - 1:
            seen = [row[name] for row in rows[begun:-1] if row[name] is not None]
            if seen:
                assert found.worst is not None
                assert max(seen) - value <= found.worst.best - found.worst.now + 1e-9  # type: ignore[type-var]


def test_lines_of_releases_may_branch() -> None:
    start = Course.of_base(THREE[0]).then(THREE[1], ["a"])
    rejected = start.then({"a": 0.0}, ["b"])
    accepted = start.then(THREE[2], ["b"]).then(THREE[3], ["c"])
    assert rejected.figures().forgetting == pytest.approx(0.9)
    assert accepted.figures() == continual(THREE, LEARNT)


@pytest.mark.parametrize(
    ("samples", "k", "expected"),
    [
        ([(4, 4)], 4, 1.0),
        ([(4, 3)], 4, 0.0),
        ([(4, 3)], 1, 0.75),
        ([(4, 3)], 2, 0.5),
        ([(4, 2), (2, 2)], 2, (1 / 6 + 1) / 2),
        ([], 3, None),
    ],
)
def test_pass_hat_k(samples: list[tuple[int, int]], k: int, expected: float | None) -> None:
    assert pass_hat_k(samples, k) == (None if expected is None else pytest.approx(expected))


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_hat_k_is_the_mean_over_all_choices_of_k_answers(
    answers: list[bool], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(answers)))
    chosen = [all(group) for group in combinations(answers, k)]
    assert pass_hat_k([(len(answers), sum(answers))], k) == pytest.approx(sum(chosen) / len(chosen))


@pytest.mark.parametrize(("samples", "k"), [([(4, 4)], 0), ([(4, 4), (3, 1)], 4), ([(2, 3)], 1)])
def test_pass_hat_k_needs_k_answers(samples: list[tuple[int, int]], k: int) -> None:
    with pytest.raises(ValueError, match="expected k"):
        pass_hat_k(samples, k)
