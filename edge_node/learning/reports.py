"""How a round goes and went, for people: its progress file and its TensorBoard files.

In: what the trainer logs, numbers alone. Out: `learning/reports/<round>/progress.json`, whole
whenever it is read, and a folder for TensorBoard. Kept after the round, of the newest KEPT rounds.
Imports nothing heavy.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

from edge_node.disk import read_json
from edge_node.errors import SettingsError

KEPT = 20
"""Rounds whose reports stay on disk."""
PAUSE_S = 1.0
"""Shortest time between two writings of a progress file."""
LOGGED = ("loss", "kl_base", "kl_release", "reward", "grad_norm", "learning_rate")
"""What is kept of each step, where the method has it; the rest is in the TensorBoard files."""
WRITERS = ("tensorboard", "tensorboardX")
"""Packages that transformers writes TensorBoard files with; one of them is enough."""


@dataclass(frozen=True)
class Progress:
    """One round so far.

    seconds: in training, over restarts. eta_s: until its last step at the pace since the learner's
    start; None before the first step. tokens: as TRL counts them, since the learner's start. waits:
    for what it waits now, or empty. entries: a dict for each step, of `step` and LOGGED. stage: of
    what these are the steps, when not of the round's plan.
    """

    step: int
    steps: int
    seconds: float
    eta_s: float | None = None
    tokens: int | None = None
    waits: str = ""
    entries: Sequence[Mapping[str, float]] = field(default=())
    stage: str = ""

    def newest(self) -> dict[str, float]:
        """What the last step logged, without its number."""
        last = self.entries[-1] if self.entries else {}
        return {name: value for name, value in last.items() if name != "step"}


def read_entries(history: Sequence[Mapping[str, object]]) -> list[dict[str, float]]:
    """Steps of a trainer's log; what is no finite number is left out."""
    return [
        {"step": int(str(entry["step"]))}
        | {
            name: float(value)
            for name in LOGGED
            if isinstance(value := entry.get(name), int | float) and math.isfinite(value)
        }
        for entry in history
        if "loss" in entry and "step" in entry
    ]


class Report:
    """The report of one round, written by the learner."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._written: float | None = None
        self._last: Progress | None = None

    def tell(self, progress: Progress) -> None:
        """Written once in PAUSE_S, and at the last step; what is left by `end`. Raises OSError."""
        self._last = progress
        now = self._clock()
        due = self._written is None or now - self._written >= PAUSE_S
        if due or progress.step == progress.steps:
            self._write(progress)
            self._written = now

    def waits(self, reason: str) -> None:
        """For what the round waits; empty when it goes on. Raises OSError."""
        if self._last is not None and self._last.waits != reason:
            fields = {name: getattr(self._last, name) for name in Progress.__dataclass_fields__}
            self._last = Progress(**fields | {"waits": reason})
            self._write(self._last)

    def end(self) -> None:
        """What was told last is written; raises OSError."""
        if self._last is not None:
            self._write(self._last)

    def _write(self, progress: Progress) -> None:
        """Whole when it has its name. Nothing is forced to disk: the next step writes it again."""
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / ".progress.json"
        partial.write_text(json.dumps(asdict(progress)))
        partial.replace(self._folder / "progress.json")


def report_folder(data_dir: Path, round_id: str) -> Path:
    """Where the report of a round is, or was."""
    return data_dir / "learning" / "reports" / round_id


def read_progress(data_dir: Path, round_id: str) -> Progress | None:
    """None when there is none, or none that can be read."""
    try:
        document = read_json(report_folder(data_dir, round_id) / "progress.json")
        return Progress(**document)
    except (OSError, ValueError, TypeError):
        return None


def keep_newest(data_dir: Path) -> None:
    """Removes all reports but the newest KEPT: a round's id begins with its number."""
    folders = sorted(report_folder(data_dir, "").glob("r*"), reverse=True)
    for folder in folders[KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)


def expect_tensorboard(wanted: bool) -> None:
    """Raises SettingsError when TensorBoard files are wanted and no package writes them."""
    if wanted and not any(find_spec(name) for name in WRITERS):
        raise SettingsError(
            "EDGE_LEARNING__TENSORBOARD is true, and neither of the packages "
            f"{' and '.join(WRITERS)} is installed. Run `pip install {WRITERS[-1]}`, or set the "
            "variable to false."
        )
