from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_node.errors import SettingsError
from edge_node.learning import reports
from edge_node.learning.reports import (
    Progress,
    Report,
    expect_tensorboard,
    keep_newest,
    read_entries,
    read_progress,
    report_folder,
)


def make_progress(step: int, steps: int = 9) -> Progress:
    entries = [{"step": number, "loss": 1 / number} for number in range(1, step + 1)]
    return Progress(step=step, steps=steps, seconds=float(step), eta_s=1.5, entries=entries)


def test_progress_is_written_once_a_second_and_at_the_last_step(tmp_path: Path) -> None:
    now = 100.0
    report = Report(report_folder(tmp_path, "r1"), clock=lambda: now)
    assert read_progress(tmp_path, "r1") is None
    for step, at, seen in [(1, 100.0, 1), (2, 100.9, 1), (3, 101.0, 3), (4, 101.1, 3)]:
        now = at
        report.tell(make_progress(step))
        shown = read_progress(tmp_path, "r1")
        assert shown is not None
        assert shown.step == seen
    report.end()
    shown = read_progress(tmp_path, "r1")
    assert shown is not None
    assert shown.step == 4, "a round that ends early has told its last step"
    report.tell(make_progress(9))
    shown = read_progress(tmp_path, "r1")
    assert shown is not None
    assert (shown.step, shown.newest()) == (9, {"loss": 1 / 9})
    assert [path.name for path in report_folder(tmp_path, "r1").iterdir()] == ["progress.json"]


def test_a_wait_is_told_at_once_with_what_was_known(tmp_path: Path) -> None:
    report = Report(report_folder(tmp_path, "r1"), clock=lambda: 0.0)
    report.waits("users' requests")
    assert read_progress(tmp_path, "r1") is None, "nothing is known yet"
    report.tell(make_progress(1))
    report.tell(make_progress(2))
    report.waits("users' requests")
    shown = read_progress(tmp_path, "r1")
    assert shown is not None
    assert (shown.step, shown.waits) == (2, "users' requests")
    report.waits("")
    shown = read_progress(tmp_path, "r1")
    assert shown is not None
    assert shown.waits == ""


def test_only_finite_numbers_of_steps_are_kept() -> None:
    history = [
        {"step": 1, "loss": 0.5, "kl": float("nan"), "reward": None, "texts": "a customer wrote"},
        {"step": 1, "train_runtime": 3.0},
        {"step": 2, "loss": 0.25, "reward": 1, "kl_base": 0.5, "kl_release": 0.25},
    ]
    entries = read_entries(history)
    assert entries == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25, "kl_base": 0.5, "kl_release": 0.25, "reward": 1.0},
    ]
    json.dumps(entries, allow_nan=False)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 1}', '{"other": 1}'])
def test_a_damaged_file_is_no_progress(tmp_path: Path, content: str) -> None:
    folder = report_folder(tmp_path, "r1")
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(content)
    assert read_progress(tmp_path, "r1") is None


def test_reports_of_the_newest_rounds_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "KEPT", 2)
    for name in ("r000009-v2-ab", "r000010-v1-cd", "r000002-v9-ef"):
        (report_folder(tmp_path, name) / "tensorboard").mkdir(parents=True)
    keep_newest(tmp_path)
    assert sorted(path.name for path in report_folder(tmp_path, "").iterdir()) == [
        "r000009-v2-ab",
        "r000010-v1-cd",
    ]


def test_tensorboard_without_a_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reports, "WRITERS", ("no_such_package",))
    expect_tensorboard(False)
    with pytest.raises(SettingsError, match=r"pip install no_such_package"):
        expect_tensorboard(True)
    monkeypatch.setattr(reports, "WRITERS", ("no_such_package", "json"))
    expect_tensorboard(True)
