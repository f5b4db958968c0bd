"""The node's current problems."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_node.problems import MAX_TEXT, Problems


def test_a_problem_is_seen_by_every_process_until_its_room_succeeds(tmp_path: Path) -> None:
    learner, supervisor = Problems(tmp_path), Problems(tmp_path)
    learner.report("learning", "Round r1 was abandoned.", "Look at logs/learner.log.")
    [seen] = supervisor.current()
    assert (seen.room, seen.text, seen.next_step) == (
        "learning",
        "Round r1 was abandoned.",
        "Look at logs/learner.log.",
    )
    supervisor.clear("learning")
    assert learner.current() == []
    learner.clear("learning")


def test_since_is_that_of_the_first_failure(tmp_path: Path) -> None:
    problems = Problems(tmp_path)
    problems.report("learning", "Round r1 was abandoned.", "Wait.")
    [first] = problems.current()
    file = tmp_path / "problems" / "learning.json"
    file.write_text(file.read_text().replace(first.since, "2026-01-01T00:00:00+00:00"))
    problems.report("learning", "Round r2 was abandoned.", "Wait.")
    [later] = problems.current()
    assert (later.text, later.since) == ("Round r2 was abandoned.", "2026-01-01T00:00:00+00:00")


def test_rooms_are_apart_and_sorted(tmp_path: Path) -> None:
    problems = Problems(tmp_path)
    problems.report("serving", "b", "")
    problems.report("capture", "a", "")
    assert [problem.room for problem in problems.current()] == ["capture", "serving"]
    problems.clear("serving")
    assert [problem.room for problem in problems.current()] == ["capture"]


def test_a_repeat_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    problems = Problems(tmp_path)
    for _ in range(3):
        problems.report("serving", "It does not start.", "Free the port.")
    assert [record.message for record in caplog.records] == ["trouble"]


def test_a_disk_that_takes_no_file_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "problems").write_text("a file where the folder should be")
    problems = Problems(tmp_path)
    problems.report("capture", "x" * (MAX_TEXT + 1), "Free space.")
    assert [problem.text for problem in problems.current()] == ["x" * MAX_TEXT]
    problems.clear("capture")
    assert problems.current() == []


def test_a_damaged_file_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "problems").mkdir()
    (tmp_path / "problems" / "learning.json").write_text("{")
    assert Problems(tmp_path).current() == []
