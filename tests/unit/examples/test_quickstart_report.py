from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart.operator_view import Release, Snapshot, Update
from examples.quickstart.plot import write_plot
from examples.quickstart.report import check_bars
from examples.quickstart.tiny import QUICKSTART, SIZES
from examples.quickstart.world import StopAt
from protos.operators.v1 import operators_pb2


def make_report() -> dict[str, Any]:
    nodes = {
        key: {
            "cohort": cohort,
            "environment": f"work-{key}",
            "learns": key != "C",
            "served": [
                {"at_s": 10.0, "release": "v0-00000000"},
                {"at_s": 50.0, "release": "v1-11111111"},
            ],
            "points": [
                {
                    "at_s": 12.0,
                    "kind": "before",
                    "release": "v0-00000000",
                    "passed": 0,
                    "total": 100,
                },
                {
                    "at_s": 14.0,
                    "kind": "anchor",
                    "release": "v0-00000000",
                    "passed": 98,
                    "total": 100,
                },
                {
                    "at_s": 60.0,
                    "kind": "wave",
                    "release": "v1-11111111",
                    "passed": 95,
                    "total": 100,
                },
                {
                    "at_s": 70.0,
                    "kind": "after",
                    "release": "v1-11111111",
                    "passed": 95,
                    "total": 100,
                },
                {
                    "at_s": 75.0,
                    "kind": "anchor",
                    "release": "v1-11111111",
                    "passed": 94,
                    "total": 100,
                },
            ],
        }
        for key, cohort in (("A", "shared"), ("B", "shared"), ("C", "shared"), ("D", "zeta"))
    }
    return {
        "success": {
            "before": dict.fromkeys("ABCD", 0.0),
            "after": {"A": 88.0, "B": 92.0, "C": 60.0, "D": 90.0},
        },
        "anchor": {when: dict.fromkeys("ABCD", 85.0) for when in ("before", "after", "lowest")},
        "releases": 2,
        "updates": {
            "sent": 5,
            "admitted": 7,
            "merged": 2,
            "waiting": 1,
            "superseded": 1,
            "set_aside": 1,
            "quarantined": 1,
            "forgotten": 1,
        },
        "requests": {"total": 10, "failed": 0},
        "answers_without_exact_version": 0,
        "cross_cohort_updates_merged": 0,
        "seed": 0,
        "seconds": {},
        "detail": {
            "nodes": nodes,
            "title": "Lorikeet quickstart",
            "lowest_anchor": 85,
            "text_logprob": {},
        },
    }


def put(*path: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        for key in path[:-1]:
            report = report[key]
        report[path[-1]] = value

    return change


def test_a_run_that_just_meets_every_bar_passes() -> None:
    assert [bar.text for bar in check_bars(make_report(), QUICKSTART) if not bar.holds] == []


@pytest.mark.parametrize(
    "change",
    [
        put("success", "before", "C", value=6),
        put("success", "after", "A", value=87),
        put("success", "after", "C", value=59),
        put("success", "after", "D", value=89),
        put("anchor", "after", "B", value=84),
        put("updates", "merged", value=1),
        put("requests", "failed", value=1),
        put("answers_without_exact_version", value=1),
        put("cross_cohort_updates_merged", value=1),
    ],
)
def test_each_bar_can_fail_alone(change: Callable[[dict[str, Any]], None]) -> None:
    report = copy.deepcopy(make_report())
    change(report)
    assert sum(not bar.holds for bar in check_bars(report, QUICKSTART)) == 1


def test_nothing_admitted_is_no_success() -> None:
    report = make_report()
    report["updates"] = dict.fromkeys(report["updates"], 0)
    assert [bar.text for bar in check_bars(report, QUICKSTART) if not bar.holds] == [
        "every admitted update is accounted for"
    ]


def test_plot_is_a_picture(tmp_path: Path) -> None:
    write_plot(make_report(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rates", "holds"),
    [
        ({"A": 90, "B": 100, "C": 70}, True),
        ({"A": 90, "B": 99, "C": 70}, False),
        ({"A": 90, "B": 100, "C": 69}, False),
        ({"D": 95}, True),
        ({"D": 94}, False),
    ],
)
def test_targets_of_a_cohort(rates: dict[str, float], holds: bool) -> None:
    assert StopAt(mean_a_b=95, c=70, d=95).holds(rates) is holds


def make_update(update_id: str, node_id: str, cohort: str, state: str) -> Update:
    return Update(update_id, node_id, cohort, 1, state, "start", "", "")


def make_release(label: str, cohort: str, state: str, updates: tuple[str, ...]) -> Release:
    return Release(label, label, cohort, state, ("stable",), label, updates, 0.0, "")


def make_snapshot(*releases: Release) -> Snapshot:
    nodes = {
        name: operators_pb2.Node(node_id=f"{name}-1", name=name, cohort=cohort)
        for name, cohort in (("a", "shared"), ("d", "zeta"))
    }
    updates = (
        make_update("u1", "a-1", "shared", "merged"),
        make_update("u2", "d-1", "zeta", "waiting"),
    )
    return Snapshot(nodes, updates, releases)


def test_counts_of_updates() -> None:
    counts = make_snapshot().update_counts()
    assert {state: count for state, count in counts.items() if count} == {
        "waiting": 1,
        "merged": 1,
        "admitted": 2,
    }
    assert {"planned", "superseded", "set_aside", "quarantined", "forgotten"} <= counts.keys()
    assert make_snapshot().update_counts("zeta")["admitted"] == 1


def test_an_update_merged_into_another_cohort_is_seen() -> None:
    clean = make_snapshot(make_release("v1-aaaaaaaa", "shared", "accepted", ("u1",)))
    mixed = make_snapshot(make_release("v1-aaaaaaaa", "shared", "accepted", ("u1", "u2")))
    unknown = make_snapshot(make_release("v1-aaaaaaaa", "shared", "accepted", ("u9",)))
    assert [s.cross_cohort_merges() for s in (clean, mixed, unknown)] == [0, 1, 1]


def test_only_accepted_merges_count_as_releases() -> None:
    snapshot = make_snapshot(
        make_release("v0-aaaaaaaa", "shared", "accepted", ()),
        make_release("v1-bbbbbbbb", "shared", "accepted", ("u1",)),
        make_release("v2-cccccccc", "shared", "rejected", ("u1",)),
    )
    assert [release.label for release in snapshot.accepted()] == ["v1-bbbbbbbb"]


@pytest.mark.parametrize(("learning_s", "enough"), [(10, False), (99, False), (101, True)])
def test_less_is_enough_once_patience_is_over(learning_s: float, enough: bool) -> None:
    size = replace(
        SIZES["full"], stop_at=StopAt(95, 70, 94), stop_late_at=StopAt(92, 66, 92), patience_s=100
    )
    rates = {"A": 86.0, "B": 99.0, "C": 87.0}
    assert size.is_enough(rates, learning_s) is enough
    assert not SIZES["small"].is_enough(rates, learning_s), "a small run has no targets"


def test_the_driver_never_stops_below_the_bars() -> None:
    size = SIZES["full"]
    for stop in (size.stop_at, size.stop_late_at):
        assert stop is not None
        assert (stop.mean_a_b, stop.c, stop.d) >= (90, 60, 90)
