"""Group commit: one transaction for all who wait, and an error only for whom it concerns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from central.errors import CentralError
from central.intake.commits import Commits
from central.journal import Journal, NewEvent, State, UpdateRecord
from protos.manifest import UpdateManifest
from tests.unit.central import builders as make

Outcome = Any
"""A record, or an error."""


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(f"sqlite:///{tmp_path}/journal.db")
    release = make.make_release()
    journal.append(make.cohort_created(release), make.token_created("shared", "t"))
    journal.append(*(make.node_enrolled(node, "shared", "t") for node in ("a", "b", "c")))
    yield journal
    journal.close()


def admit(
    commits: Commits,
    *updates: UpdateManifest,
    fails: str = "",
    kind: type[Exception] = CentralError,
) -> list[Outcome]:
    """Admit them at the same moment, in this order; the update of node `fails` has an error."""

    def events(update: UpdateManifest, state: State) -> list[NewEvent]:
        if update.node_id == fails:
            raise kind(f"not {fails}")
        return [make.admitted(update)]

    with ThreadPoolExecutor(len(updates)) as threads, commits._turn:
        done: list[Future[UpdateRecord]] = []
        for update in updates:
            admitted = (update.node_id, update.digest, partial(events, update))
            done.append(threads.submit(commits.admit, *admitted))
            while len(commits._waiting) < len(done):
                time.sleep(0.001)
    return [future.exception() or future.result() for future in done]


def update_of(node: str, sequence: int = 1) -> UpdateManifest:
    return make.make_update(make.make_release(), node, sequence)


@pytest.fixture
def sizes(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of events of each transaction."""
    sizes: list[int] = []
    append = journal.append

    def counting(*events: NewEvent) -> Any:
        sizes.append(len(events))
        return append(*events)

    monkeypatch.setattr(journal, "append", counting)
    return sizes


def test_those_who_wait_share_a_transaction(journal: Journal, sizes: list[int]) -> None:
    updates = [update_of(node) for node in ("a", "b", "c")]
    records = admit(Commits(journal), *updates)
    assert [record.update_id for record in records] == [update.digest for update in updates]
    assert sizes == [3]
    sequences = [record.admitted_sequence for record in records]
    assert sequences == sorted(sequences)


def test_updates_of_one_node_never_share_a_transaction_and_keep_their_order(
    journal: Journal, sizes: list[int]
) -> None:
    records = admit(Commits(journal), update_of("a", 2), update_of("b"), update_of("a", 1))
    assert sizes == [2, 1]
    assert records[0].admitted_sequence < records[2].admitted_sequence


@pytest.mark.parametrize("kind", [CentralError, PermissionError])
def test_an_error_reaches_only_its_own_update(journal: Journal, kind: type[Exception]) -> None:
    commits = Commits(journal)
    updates = [update_of(node) for node in ("a", "b", "c")]
    first, second, third = admit(commits, *updates, fails="b", kind=kind)
    assert (first.update_id, third.update_id) == (updates[0].digest, updates[2].digest)
    assert isinstance(second, kind)
    assert str(second) == "not b"
    with journal.read() as state:
        assert len(state.updates) == 2
    assert admit(commits, update_of("b"))[0].update_id == update_of("b").digest


def test_a_defect_leaves_nobody_waiting(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    commits = Commits(journal)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "append", fail)
        outcomes = admit(commits, update_of("a"), update_of("b"))
    assert [str(outcome) for outcome in outcomes] == ["a defect"] * 2
    assert admit(commits, update_of("a"))[0].update_id == update_of("a").digest
