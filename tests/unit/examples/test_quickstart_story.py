from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from examples.quickstart.operator_view import Release, Snapshot, Update
from examples.quickstart.story import Point, Story, serving_label
from examples.quickstart.system import System
from examples.quickstart.tiny import NODES, QUICKSTART, SIZES
from protos.operators.v1 import operators_pb2


@dataclass
class Clock:
    now_s: float = 0.0


@dataclass
class Scene:
    story: Story
    said: list[str] = field(default_factory=list)

    def serve(self, label: str) -> None:
        for record in self.story.records.values():
            record.serving = label

    def wave(self, key: str, label: str, passed: int, at_s: float = 0.0) -> None:
        self.story.records[cast(Any, key)].points.append(Point(at_s, "wave", label, passed, 100))

    def central(self, head: str, *updates: tuple[str, str, str]) -> None:
        """`updates`: node name, label of the start, state."""
        self.story.snapshot = Snapshot(
            nodes={
                name: operators_pb2.Node(node_id=f"{name}-1", name=name, cohort="shared")
                for name in "abc"
            },
            updates=tuple(
                Update(f"u{n}", f"{name}-1", "shared", n, state, f"id-{start}", "", "")
                for n, (name, start, state) in enumerate(updates)
            ),
            releases=tuple(
                Release(
                    f"id-{v}",
                    v,
                    "shared",
                    "accepted",
                    ("stable",) if v == head else (),
                    v,
                    (),
                    0.0,
                    "",
                )
                for v in ("v0-a", "v1-b")
            ),
        )


@pytest.fixture
def scene() -> Scene:
    said: list[str] = []
    size = SIZES["full"]
    plans = [NODES[key] for key in ("A", "B", "C")]
    system = SimpleNamespace(world=QUICKSTART, plans=plans, size=size, seed=0)
    return Scene(Story(cast(System, system), 0.0, said.append), said)


def test_a_taught_node_is_expected_to_send_one_update_for_each_lesson(scene: Scene) -> None:
    record = scene.story.records["A"]
    scene.serve("v0-a")
    scene.central("v0-a")
    assert not scene.story.expects_update(record)
    record.taught["v0-a"] = 1
    assert scene.story.expects_update(record)
    scene.central("v0-a", ("a", "v0-a", "set_aside"))
    assert not scene.story.expects_update(record)
    record.taught["v0-a"] = 2
    assert scene.story.expects_update(record)


def test_a_node_that_never_trains_is_not_waited_for(scene: Scene) -> None:
    scene.serve("v0-a")
    scene.central("v0-a")
    scene.story.records["C"].taught["v0-a"] = 1
    assert not scene.story.expects_update(scene.story.records["C"])


def test_what_is_on_its_way(scene: Scene) -> None:
    assert scene.story.on_its_way() == ["central has not been seen"]
    scene.serve("v0-a")
    scene.central("v1-b", ("a", "v0-a", "merged"), ("b", "v0-a", "waiting"))
    assert scene.story.on_its_way() == [
        "1 updates waiting",
        *(f"node {key} does not serve v1-b yet" for key in "ABC"),
    ]
    scene.serve("v1-b")
    scene.central("v1-b", ("a", "v0-a", "merged"), ("b", "v0-a", "set_aside"))
    assert scene.story.on_its_way() == []


def test_a_wave_is_due_on_each_release_and_after_a_standstill(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(scene.story, "now_s", lambda: clock.now_s)
    record = scene.story.records["A"]
    scene.serve("v0-a")
    scene.central("v0-a")
    assert scene.story._is_due(record)
    scene.wave("A", "v0-a", passed=10, at_s=1.0)
    assert not scene.story._is_due(record)
    clock.now_s = 60.0
    assert scene.story._is_due(record)
    record.taught["v0-a"] = 1
    assert not scene.story._is_due(record)
    scene.serve("v1-b")
    assert scene.story._is_due(record)


@pytest.mark.parametrize(("passed", "enough"), [(97, True), (80, False)])
async def test_a_cohort_is_judged_by_its_waves_on_one_release(
    scene: Scene, passed: int, enough: bool
) -> None:
    for key in ("A", "B", "C"):
        scene.wave(key, "v1-b", passed=passed)
    assert await scene.story._is_enough(scene.story.records["A"], "v1-b") is enough
    assert list(scene.story.outcome) == (["shared"] if enough else [])


async def test_a_cohort_is_not_judged_by_waves_on_different_releases(scene: Scene) -> None:
    scene.story.world = replace(QUICKSTART, peers_limit_s=0.0)
    scene.wave("A", "v1-b", passed=100)
    scene.wave("B", "v1-b", passed=100)
    scene.wave("C", "v0-a", passed=100)
    assert not await scene.story._is_enough(scene.story.records["A"], "v1-b")


BASE = {"id": "base@1", "root": "base@1"}
ALIAS = {"id": "lorikeet", "root": "lorikeet@v1-b"}


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (httpx.Response(200, json={"data": [BASE, ALIAS]}), "v1-b"),
        (httpx.Response(200, json={"data": []}), ""),
        (httpx.Response(503, text="draining"), ""),
    ],
)  # fmt: skip
async def test_serving_label(answer: httpx.Response, label: str) -> None:
    async with httpx.AsyncClient(transport=httpx.MockTransport(lambda request: answer)) as client:
        assert await serving_label(client, "http://node") == label
