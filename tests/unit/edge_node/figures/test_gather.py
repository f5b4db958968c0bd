"""The supervisor's figures: what they say of a node's stores, and a store that cannot be read."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_node.experience import ExperienceStore
from edge_node.figures import Family, Tally
from edge_node.figures.gather import Gatherer, tell
from edge_node.figures.tally import HEARD, note_heard
from edge_node.identity import Identity
from edge_node.outbox import Outbox
from edge_node.problems import Problems
from edge_node.settings import EdgeSettings
from protos.lora import LoraTensors
from tests.fakes.node_data import activate, make_node, meet


@pytest.fixture
def settings(tmp_path: Path) -> EdgeSettings:
    return make_node(tmp_path / "node")


def gatherer(settings: EdgeSettings, tally: Tally | None = None) -> Gatherer:
    folder = settings.data_dir
    return Gatherer(
        folder,
        Identity.load(folder),
        SimpleNamespace(generation=3),
        Outbox(folder / "outbox", "auto"),
        ExperienceStore(folder / "experience.db"),
        tally or Tally(),
    )


def read(gatherer: Gatherer) -> dict[str, float]:
    return {
        " ".join((family.name.removeprefix("lorikeet_node_"), *values)): number
        for family in gatherer.families()
        for values, number in family.samples
    }


def test_a_new_node(settings: EdgeSettings) -> None:
    found = read(gatherer(settings))
    assert found["engine_starts_total"] == 3
    assert found["problems"] == 0
    assert found["experiences"] == 0
    assert found["outbox_updates waiting"] == 0
    assert found["certificate_expires_timestamp_seconds"] > 1.7e9
    assert not [name for name in found if name.startswith(("release_info", "central_heard"))]
    assert {value for name, value in found.items() if name.startswith("figures_unread")} == {0}


def test_release_experience_problems_switches_and_proofs(settings: EdgeSettings) -> None:
    label = activate(settings, LoraTensors({}), 7).label
    meet(settings, label, 3)
    Problems(settings.data_dir).report("capture", "Answers are lost.", "Look.")
    note_heard(settings.data_dir)
    os.utime(settings.data_dir / HEARD, (1000, 1000))
    tally = Tally()
    tally.switched(2.5)
    tally.switched(0.5)
    tally.proved("passed")
    found = read(gatherer(settings, tally))
    assert found[f"release_info {label}"] == 1
    assert found["release_version"] == 7
    assert found["release_created_timestamp_seconds"] == 1763769600 + 365 * 86400
    assert found["experiences"] == 3
    assert found["problem capture"] == 1
    assert found["problems"] == 1
    assert found["central_heard_timestamp_seconds"] == 1000
    assert found["release_switches_total"] == 2
    assert found["release_switch_seconds_total"] == 3
    assert found["release_last_switch_seconds"] == 0.5
    assert found["proofs_total passed"] == 1


def test_a_store_that_cannot_be_read_hides_no_other(settings: EdgeSettings) -> None:
    whole = gatherer(settings)
    (settings.data_dir / "outbox" / "outbox.db").write_bytes(b"no database")
    activate(settings, LoraTensors({}), 1)
    (settings.data_dir / "releases" / "active.json").write_text("{")
    found = read(whole)
    unread = {name for name, number in found.items() if name.startswith("figures_") and number}
    assert unread == {"figures_unread updates", "figures_unread releases"}
    assert found["disk_free_bytes"] > 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.pop("name"),
        lambda d: d.update(name="vllm:requests"),
        lambda d: d.update(kind="histogram"),
        lambda d: d.update(samples=[[["a", "b"], 1]]),
        lambda d: d.update(samples=[[["a"], "many"]]),
        lambda d: d.update(samples=3),
    ],
)
def test_a_malformed_family_is_refused(spoil: Callable[[dict[str, Any]], object]) -> None:
    family = Family("lorikeet_node_x", "gauge", "X.", ("a",), ((("1",), 2.0),))
    document = asdict(family)
    assert Family.read(document) == family
    spoil(document)
    with pytest.raises(ValueError, match=r"malformed|could not convert"):
        Family.read(document)


async def test_telling_goes_on_whatever_fails() -> None:
    tried = asyncio.Event()
    calls = 0

    def gather() -> list[Family]:
        nonlocal calls
        calls += 1
        if calls > 2:
            tried.set()
        raise OSError("no disk")

    task = asyncio.create_task(tell(gather, SimpleNamespace(), 0))  # type: ignore[arg-type]
    await asyncio.wait_for(tried.wait(), 5)
    task.cancel()
