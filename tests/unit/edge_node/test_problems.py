"""The node's current problems."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from edge_node.problems import MAX_TEXT, Problems, calm_s


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


def test_what_the_disk_did_not_take_is_known_to_the_whole_process(tmp_path: Path) -> None:
    """What one Problems of the process could not write, another one shows and clears."""
    (tmp_path / "problems").write_text("a file where the folder should be")
    Problems(tmp_path).report("serving", "It does not start.", "Free the port.")
    assert [problem.room for problem in Problems(tmp_path).current()] == ["serving"]
    Problems(tmp_path).clear("serving")
    assert Problems(tmp_path).current() == []


def test_a_problem_that_cannot_be_written_again_and_again_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = Problems(tmp_path)
    problems.report("uploads", "An older one.", "")

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    for _ in range(3):
        problems.report("uploads", "A newer one.", "")
    assert sum(record.message == "trouble" for record in caplog.records) == 2
    assert [problem.text for problem in problems.current()] == ["A newer one."]


def test_a_problem_is_one_line_of_what_every_terminal_and_message_takes(tmp_path: Path) -> None:
    problems = Problems(tmp_path)
    problems.report("releases", "two\nlines \x1b[2J of \udcff", "a\tb")
    [problem] = problems.current()
    assert (problem.text, problem.next_step) == ("two lines  [2J of", "a b")
    problem.text.encode()


@pytest.mark.parametrize(("ran_s", "calm"), [(0, 10), (1, 10), (30, 60), (300, 600), (1e6, 600)])
def test_a_process_must_run_twice_as_long_as_the_one_that_ended(ran_s: float, calm: float) -> None:
    assert calm_s(ran_s) == calm
