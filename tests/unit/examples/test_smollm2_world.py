"""SmolLM2's world: bars, settings and the picture of a run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from central.settings import CentralSettings
from edge_node.environments.loader import load_environment
from edge_node.settings import EdgeSettings
from examples.quickstart.demo import WORLDS
from examples.quickstart.plot import write_plot
from examples.quickstart.report import check_bars
from examples.quickstart.system import System
from examples.smollm2.world import SMOLLM2

COUNTED = ("merged", "waiting", "superseded", "set_aside", "quarantined", "forgotten")


def make_report() -> dict[str, Any]:
    """A run that just meets every bar."""
    points = [
        {"at_s": 12.0, "kind": "before", "release": "v0-00000000", "passed": 0, "total": 100},
        {"at_s": 14.0, "kind": "anchor", "release": "v0-00000000", "passed": 64, "total": 90},
        {"at_s": 400.0, "kind": "after", "release": "v1-11111111", "passed": 95, "total": 100},
        {"at_s": 420.0, "kind": "anchor", "release": "v1-11111111", "passed": 66, "total": 90},
    ]
    served = [
        {"at_s": 10.0, "release": "v0-00000000"},
        {"at_s": 300.0, "release": "v1-11111111"},
    ]
    nodes = {
        plan.key: {
            "cohort": plan.cohort,
            "environment": plan.environment,
            "learns": plan.learns,
            "served": served,
            "points": points,
        }
        for plan in SMOLLM2.nodes.values()
    }
    return {
        "success": {"before": dict.fromkeys("ABC", 5.0), "after": {"A": 88, "B": 92, "C": 80}},
        "anchor": {
            "before": dict.fromkeys("ABC", 70.0),
            "after": dict.fromkeys("ABC", 65.0),
            "lowest": dict.fromkeys("ABC", 60.0),
        },
        "text_logprob": {"before": -3.3, "after": -3.3, "lowest": -3.399},
        "releases": 3,
        "updates": {"sent": 6, "admitted": 6} | dict.fromkeys(COUNTED, 1),
        "requests": {"total": 10, "failed": 0},
        "answers_without_exact_version": 0,
        "cross_cohort_updates_merged": 0,
        "seed": 0,
        "detail": {
            "nodes": nodes,
            "title": SMOLLM2.title,
            "lowest_anchor": 65.0,
            "text_logprob": {"v0-00000000": -3.3, "v1-11111111": -3.399},
        },
    }


def put(*path: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        for key in path[:-1]:
            report = report[key]
        report[path[-1]] = value

    return change


def test_a_run_that_just_meets_every_bar_passes() -> None:
    assert [bar.text for bar in check_bars(make_report(), SMOLLM2) if not bar.holds] == []


@pytest.mark.parametrize(
    "change",
    [
        put("success", "before", "C", value=6),
        put("success", "after", "A", value=87),
        put("success", "after", "C", value=79),
        put("anchor", "after", "B", value=64),
        put("text_logprob", "lowest", value=-3.41),
        put("releases", value=4),
        put("updates", "merged", value=2),
        put("requests", "failed", value=1),
    ],
)
def test_each_bar_can_fail_alone(change: Callable[[dict[str, Any]], None]) -> None:
    report = copy.deepcopy(make_report())
    change(report)
    assert sum(not bar.holds for bar in check_bars(report, SMOLLM2)) == 1


def test_plot_is_a_picture(tmp_path: Path) -> None:
    write_plot(make_report(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", sorted(WORLDS))
def test_the_programs_accept_a_worlds_settings(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = WORLDS[name]
    for size in world.sizes.values():
        system = System(world, tmp_path, tmp_path / "base", size, seed=1)
        for plan in system.plans:
            for key, value in system.node_environment(plan, "token").items():
                monkeypatch.setenv(key, value)
            settings = EdgeSettings()
            assert settings.learning.enabled is plan.learns
            specs = settings.environments
            assert [spec.name for spec in specs] == [
                plan.environment,
                world.anchor(1).name,
                *([world.texts.name] if world.texts else []),
            ]
            assert [spec.anchor for spec in specs] == [False, *[True] * (len(specs) - 1)]
            assert all(load_environment(spec) for spec in specs)
        for key, value in system.central_environment().items():
            monkeypatch.setenv(key, value)
        assert CentralSettings().merge.rank <= settings.serving.max_lora_rank
        json.dumps(dict(world.central))
