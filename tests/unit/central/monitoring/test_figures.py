"""Central's figures: what they say, what a scrape may not walk, and what they never name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from central.calls import Calls
from central.errors import Reason, StorageError
from central.fleet.presence import Presence
from central.intake.uploads import Uploads
from central.journal import Journal
from central.monitoring.figures import Figures, Sources
from central.space import Disk, Space
from protos.fleet.v1 import fleet_pb2
from tests.fakes.state_only import StateOnly
from tests.unit.central import builders as make


@pytest.fixture
def journal() -> StateOnly:
    journal = StateOnly()
    journal.append(
        make.cohort_created(make.make_release()),
        make.token_created(),
        make.node_enrolled("a-00000000"),
        make.node_enrolled("b-00000000"),
    )
    return journal


@pytest.fixture
def read(journal: StateOnly, tmp_path: Path) -> Callable[..., dict[str, float]]:
    def read(**fields: Any) -> dict[str, float]:
        space = Space([tmp_path], 10, lambda place: Disk(1000, 400, None))
        sources = Sources(
            **{
                "journal": cast(Journal, journal),
                "presence": Presence(),
                "uploads": Uploads(tmp_path / "uploads"),
                "space": space,
                "calls": Calls(),
                "failure": lambda cohort: "",
                "tellers": [],
                "journal_file": None,
            }
            | fields
        )
        registry = CollectorRegistry()
        registry.register(Figures(sources))
        text = generate_latest(registry).decode()
        return {
            sample.name.removeprefix("lorikeet_central_")
            + ("".join(f" {value}" for value in sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    return read


def merge(journal: StateOnly, *sequences: int, accepted: bool = True) -> None:
    """Updates of these sequences become a release, and it is promoted when it is accepted."""
    state = journal.state
    head = state.releases[state.channels["shared", "stable"]].manifest
    updates = [make.make_update(head, sequence=sequence) for sequence in sequences]
    for update in updates:
        journal.append(make.admitted(update))
    plan = make.make_plan(head, *updates)
    candidate = make.make_candidate(plan)
    journal.append(make.planned(plan), make.built(candidate), make.decided(candidate, accepted))
    if accepted:
        journal.append(make.promoted(candidate))


def test_updates_merges_verdicts_and_heads(
    journal: StateOnly, read: Callable[..., dict[str, float]]
) -> None:
    merge(journal, 1)
    merge(journal, 2, accepted=False)
    stable = journal.state.channels["shared", "stable"]
    head = journal.state.releases[stable].manifest
    journal.append(make.admitted(make.make_update(head, "b-00000000")))
    journal.at = (datetime.fromisoformat(make.AT) + timedelta(seconds=90)).isoformat()
    found = read(failure=lambda cohort: "the disk is full")
    assert found["updates shared merged"] == 1
    assert found["updates shared waiting"] == 1
    assert found["update_waiting_oldest_seconds shared"] == 90
    assert found["merges_total shared"] == 2
    assert found["verdicts_total shared accepted"] == 1
    assert found["verdicts_total shared rejected"] == 1
    assert found["channel_version stable shared"] == 1
    changed = datetime.fromisoformat(make.AT).timestamp()
    assert found["channel_changed_timestamp_seconds stable shared"] == changed
    assert found["journal_events_total"] == journal.state.sequence
    assert found["cohort_standstill shared"] == 1
    assert read()["cohort_standstill shared"] == 0


def test_nodes_by_presence_and_what_they_say(
    journal: StateOnly, read: Callable[..., dict[str, float]]
) -> None:
    presence = Presence()
    presence.opened("a-00000000")
    problem = fleet_pb2.Problem(room="capture", text="Answers are lost.")
    presence.report(
        "a-00000000",
        fleet_pb2.NodeStatus(outbox_waiting=2, outbox_held=1, experiences=7, problems=[problem]),
    )
    found = read(presence=presence)
    assert found["nodes shared connected"] == 1
    assert found["nodes shared away"] == 1
    assert found["nodes_in_trouble shared"] == 1
    assert found["node_updates_unsent shared"] == 3
    assert found["node_experiences shared"] == 7


def test_calls_disks_and_a_part_that_fails(
    read: Callable[..., dict[str, float]], tmp_path: Path
) -> None:
    calls = Calls()
    calls.count("/lorikeet.updates.v1.UpdateService/Upload", Reason.NOT_FINITE.value)
    found = read(calls=calls)
    assert found["calls_total UpdateService/Upload NOT_FINITE"] == 1
    assert found[f"disk_free_bytes {tmp_path}"] == 400
    assert found["uploads_stopped"] == 0

    def gone(place: Path) -> Disk:
        raise StorageError("The disk is gone.")

    found = read(space=Space([tmp_path], 10, gone))
    assert found["figures_unread_total disks"] == 1
    assert "nodes shared away" in found, "the other parts are told"


class Unwalkable(dict[str, Any]):
    """Records that grow for ever: to be looked up, not walked."""

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("a scrape walked what grows with the journal")

    keys = values = items = __iter__  # type: ignore[assignment]


def test_a_scrape_walks_nothing_that_grows_with_the_journal(
    journal: StateOnly, read: Callable[..., dict[str, float]]
) -> None:
    merge(journal, 1)
    before, state = read(), journal.state
    for name in ("updates", "releases", "plans", "evaluations", "forgets", "served"):
        records = getattr(state, name)
        watched = Unwalkable(records)
        watched.__dict__.update(getattr(records, "__dict__", {}))
        setattr(state, name, watched)
    assert read() == before


def test_no_label_names_a_node_or_an_operator(
    journal: StateOnly, read: Callable[..., dict[str, float]]
) -> None:
    merge(journal, 1)
    text = " ".join(read())
    assert "a-00000000" not in text
    assert "token" not in text
