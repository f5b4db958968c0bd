"""Threads of cohorts: started once each, again after a failure, ended together."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from central.cohorts import CohortThreads
from central.errors import StorageError
from central.journal import Journal
from tests.unit.central import builders as make


def test_every_cohort_has_one_loop_that_comes_back_after_a_failure(tmp_path: Path) -> None:
    journal = Journal(f"sqlite:///{tmp_path}/journal.db")
    genesis = make.start_cohort(journal)
    runs: list[str] = []
    running = threading.Semaphore(0)
    failures: list[str] = []

    def run(cohort: str, stop: threading.Event) -> None:
        runs.append(cohort)
        if runs.count(cohort) == 1:
            raise StorageError("disk full") if cohort == "shared" else RuntimeError("odd")
        failures.append(threads.failure(cohort))
        running.release()
        journal.wait(lambda state: stop.is_set())

    threads = CohortThreads(journal, run, first_pause_s=0.001)
    threads.start()
    make.start_cohort(journal, "zeta", ("d-00000000",))
    assert running.acquire(timeout=10)
    assert running.acquire(timeout=10)
    assert sorted(text.partition(" (at 20")[0] for text in failures) == [
        "RuntimeError('odd')",
        "disk full",
    ]
    assert all(text.endswith("Z, tried again after 0.001 s)") for text in failures)
    update = make.make_update(genesis)
    journal.append(make.admitted(update))
    assert threads.failure("shared"), "not what a node did"
    journal.append(make.planned(make.make_plan(genesis, update)))
    assert (threads.failure("shared"), bool(threads.failure("zeta"))) == ("", True), "it went on"
    threads.close()
    assert sorted(runs) == ["shared", "shared", "zeta", "zeta"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cohort-")]


def test_a_loop_that_fails_again_says_since_when_until_it_has_nothing_left_to_do(
    tmp_path: Path,
) -> None:
    journal = Journal(f"sqlite:///{tmp_path}/journal.db")
    make.start_cohort(journal)
    times = iter(f"2026-11-22T12:00:0{second}.000000Z" for second in range(9))
    failed, said = threading.Semaphore(0), list[str]()

    def run(cohort: str, stop: threading.Event) -> None:
        said.append(threads.failure(cohort))
        failed.release()
        if len(said) == 3:
            threads.went_on(cohort)
            said.append(threads.failure(cohort))
            failed.release()
            journal.wait(lambda state: stop.is_set())
            return
        raise StorageError("a blob is lost")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "clock", lambda: next(times))
        threads = CohortThreads(journal, run, first_pause_s=0.001)
        threads.start()
        for _ in range(4):
            assert failed.acquire(timeout=10)
        threads.close()
    assert said == [
        "",
        "a blob is lost (at 2026-11-22T12:00:00Z, tried again after 0.001 s)",
        "a blob is lost (since 2026-11-22T12:00:00Z, last at 2026-11-22T12:00:01Z, tried again "
        "after 0.002 s)",
        "",
    ]
