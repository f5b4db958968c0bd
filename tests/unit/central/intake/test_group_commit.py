"""Group commit: one transaction for all who wait, and an error only for the one whom it concerns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from central.errors import CentralError
from central.intake.group_commit import GroupCommit
from central.journal import Journal, NewEvent, State, UpdateRecord
from tests.unit.central import builders as make


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(f"sqlite:///{tmp_path}/journal.db")
    release = make.make_release()
    journal.append(make.cohort_created(release), make.token_created("shared", "t"))
    journal.append(*(make.node_enrolled(node, "shared", "t") for node in ("a", "b", "c")))
    yield journal
    journal.close()


def admit(commits: GroupCommit, node: str, sequence: int = 1, fail: bool = False) -> Future[UpdateRecord]:
    update = make.make_update(make.make_release(), node, sequence)

    def events(state: State) -> list[NewEvent]:
        if fail:
            raise CentralError(f"not {node}")
        return [make.admitted(update)]

    done: Future[UpdateRecord] = Future()
    commits.admit(node, update.digest, events, lambda record: record, done)
    return done


def while_busy(journal: Journal, do: Callable[[], Any]) -> tuple[Any, list[int]]:
    """`do` while the journal is held; its result, and the number of events of each later transaction."""
    sizes: list[int] = []
    append = journal.append

    def counting(*events: NewEvent) -> Any:
        sizes.append(len(events))
        return append(*events)

    journal.append = counting  # type: ignore[method-assign]
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with journal.read():
            entered.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(10)
    result = do()
    leave.set()
    holder.join(10)
    return result, sizes


def test_those_who_wait_share_transactions(journal: Journal) -> None:
    commits = GroupCommit(journal)
    jobs, sizes = while_busy(journal, lambda: [admit(commits, node) for node in ("a", "b", "c")])
    records = [job.result(10) for job in jobs]
    assert [record.manifest.node_id for record in records] == ["a", "b", "c"]
    assert sum(sizes) == 3
    assert len(sizes) <= 2  # the first may have been taken before the others came
    assert [record.admitted_sequence for record in records] == sorted(record.admitted_sequence for record in records)


def test_two_updates_of_one_node_never_share_a_transaction(journal: Journal) -> None:
    commits = GroupCommit(journal)
    jobs, sizes = while_busy(journal, lambda: [admit(commits, "a", sequence) for sequence in (1, 2, 3)])
    assert {job.result(10).manifest.sequence for job in jobs} == {1, 2, 3}
    assert sizes == [1, 1, 1]


def test_an_error_reaches_only_its_own_update(journal: Journal) -> None:
    commits = GroupCommit(journal)
    jobs, _ = while_busy(journal, lambda: [admit(commits, node, fail=node == "b") for node in ("a", "b", "c")])
    assert jobs[0].result(10).manifest.node_id == "a"
    assert jobs[2].result(10).manifest.node_id == "c"
    with pytest.raises(CentralError, match="not b"):
        jobs[1].result(10)
    with journal.read() as state:
        assert len(state.updates) == 2


def test_an_answer_that_fails_fails_alone(journal: Journal) -> None:
    commits = GroupCommit(journal)
    update, done = make.make_update(make.make_release(), "a"), Future[UpdateRecord]()

    def answer(_: UpdateRecord) -> UpdateRecord:
        raise CentralError("no receipt")

    commits.admit("a", update.digest, lambda _: [make.admitted(update)], answer, done)
    with pytest.raises(CentralError, match="no receipt"):
        done.result(10)
    assert admit(commits, "b").result(10).manifest.node_id == "b"
    with journal.read() as state:
        assert update.digest in state.updates
