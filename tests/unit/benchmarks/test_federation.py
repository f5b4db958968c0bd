"""benchmarks.federation without training: who starts where, what is kept, what the bars say."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from benchmarks.federation import __main__ as program
from benchmarks.federation import chains
from benchmarks.federation.bars import bars, fall
from benchmarks.federation.chains import CHAINS, SLOW, run
from benchmarks.rules.world import World
from protos.lora import LoraModule, LoraTensors


class FakeWorld:
    """An increment is a pair whose direction says whose it is; success is the release's norm."""

    seed, tasks = 0, 10

    def __init__(self) -> None:
        self.trained: list[tuple[str, int, int | None, bool]] = []

    def train(
        self, nodes: str, number: int, start: LoraTensors, *, rank: int | None, version: int
    ) -> LoraTensors:
        assert bool(start.modules) == (version > 0), "it starts from the release of that time"
        self.trained.append((nodes, number, rank, version > 0))
        A = np.zeros((rank or 2, 70), np.float32)
        A[0, {"A": 0, "B": 1, "AB": 2}[nodes]] = 1 / 3
        return LoraTensors({"m": LoraModule(A, np.ones((3, rank or 2), np.float32))})

    def success(self, release: LoraTensors) -> dict[str, float]:
        if not release.modules:
            return dict.fromkeys(("A", "B", "C", "base"), 0.0)
        module = release.modules["m"]
        return {"A": float(np.linalg.norm(module.B @ module.A)), "B": 0, "C": 0, "base": 0}


def run_chain(name: str, folder: Path, rounds: tuple[int, ...] = (1, 2)) -> tuple[Any, FakeWorld]:
    world = FakeWorld()
    return run(cast(World, world), name, rounds, folder), world


def test_a_run_that_was_stopped_goes_on_with_what_it_kept(tmp_path: Path) -> None:
    first, world = run_chain("product-mean", tmp_path)
    assert [(nodes, number) for nodes, number, *_ in world.trained] == [
        ("A", 1), ("B", 1), ("A", 2), ("B", 2)
    ]  # fmt: skip
    again, world = run_chain("product-mean", tmp_path)
    assert again == first
    assert world.trained == []
    _, world = run_chain("factor-mean", tmp_path)
    assert [number for _, number, *_ in world.trained] == [2, 2], "the first round is shared"


def test_the_slow_node_starts_from_the_release_of_that_time(tmp_path: Path) -> None:
    _, world = run_chain("slow", tmp_path, (2 * SLOW,))
    assert [nodes for nodes, *_ in world.trained] == (["A"] * SLOW + ["B"]) * 2
    slow = [(number, later) for nodes, number, _, later in world.trained if nodes == "B"]
    assert slow == [(1, False), (2, True)]


def test_what_travels_is_what_is_merged(tmp_path: Path) -> None:
    found = {n: run_chain(n, tmp_path)[0] for n in ("product-mean", "default", "int8-both")}
    assert found["product-mean"]["errors"] == [0.0] * 4
    for way, rule in (("up", "default"), ("up", "int8-both"), ("down", "int8-both")):
        assert found[rule][way][0] < found["product-mean"][way][0]
    exact, rounded = (found[name]["success"]["1"]["A"] for name in ("product-mean", "default"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.01)


def make_rounds(own: float, c: float = 80, base: float = 98) -> Any:
    figures = {"A": own, "B": own, "C": c, "base": base}
    return {"0": {str(at): figures for at in (3, 5)}}


BEFORE = {"0": {"A": 0.0, "B": 0.0, "C": 0.0, "base": 100.0}}


@pytest.mark.parametrize(
    ("default", "said"),
    [
        (make_rounds(90), set()),
        (make_rounds(89), {"A and B"}),
        (make_rounds(90, c=71), {"C"}),
        (make_rounds(90, base=94), {"anchor"}),
    ],
)
def test_each_bar_can_fail_alone(default: Any, said: set[str]) -> None:
    found = bars({"centralised": make_rounds(100), "default": default}, BEFORE)
    failed = {name for name, holds in found.items() if not holds}
    assert len(found) == 3
    assert {what for what in said if any(f": {what}" in name for name in failed)} == said
    assert len(failed) == len(said)


def test_rounding_may_cost_a_point_on_average() -> None:
    success = {"product-mean": make_rounds(90), "default": make_rounds(88.5, c=80)}
    assert fall(success, "default") == pytest.approx(1.0)
    assert bars(success, BEFORE) == {"default: at most 1 point below float32": True}
    success["default"] = make_rounds(88)
    assert bars(success, BEFORE) == {"default: at most 1 point below float32": False}


class Inline:
    """Does a job at once, in this process, if a spawned one could import it."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        assert not work.__module__.endswith("__main__"), "a spawned process cannot import it"
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


def test_the_report_has_every_rule_and_the_extras_of_the_first_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(program, "build_base", lambda cache: cache)
    monkeypatch.setattr(chains, "world_of", lambda base, seed, tasks: FakeWorld())
    picture = tmp_path / "picture.png"
    program.main(
        ["--json", "--seeds", "2", "--keep", str(tmp_path / "keep"), "--plot", str(picture)]
    )
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["success"].keys() == CHAINS.keys()
    for name, chain in CHAINS.items():
        assert list(report["success"][name]) == (["0"] if chain.once else ["0", "1"])
        assert list(report["success"][name]["0"]) == [str(at) for at in chain.rounds]
    assert report["bytes"]["default"]["up"] < report["bytes"]["product-mean"]["up"]
    assert report["points_below_float32"].keys() == {"default", "int8-both"}
    assert len(report["bars"]) == 2 * 3 + 2 * 3 + 2
    assert picture.stat().st_size > 10_000


def test_every_line_of_the_picture_is_a_chain() -> None:
    from benchmarks.federation.plot import LINES

    assert set(LINES) <= set(CHAINS)
