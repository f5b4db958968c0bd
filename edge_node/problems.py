"""What is wrong on this node now: one current problem a room, with since when and what to do next.

In: what a room could not do, from any of the node's processes. Out: the list that `edge-node
status`, central and metrics show. A problem stays until its room succeeds again. Guarantees:
nothing raises, because a full disk must not keep a room from going on; imports nothing heavy.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from edge_node.disk import read_json

log = logging.getLogger(__name__)

MAX_TEXT = 500
"""Longest text and next step, in characters: central stores them, status prints them."""
SEE_LOG = "See the log of `edge-node serve` and logs/vllm.log in EDGE_DATA_DIR."
"""The next step where nothing better is known."""


@dataclass(frozen=True)
class Problem:
    """room: who fails, e.g. `learning`. since: its first failure after a success, ISO 8601, UTC.

    `text` says what failed and the value seen, `next_step` what a person does about it. Neither
    quotes a prompt, an answer or feedback.
    """

    room: str
    text: str
    next_step: str
    since: str


_lock = threading.Lock()
_unwritten: dict[Path, dict[str, Problem]] = {}
"""Problems that the disk did not take, by folder; they are known to this process only."""


def calm_s(ran_s: float, first_s: float = 10.0, last_s: float = 600.0) -> float:
    """How long a process must run, after one that ended in `ran_s`, to be no problem any more.

    Twice as long: a process that ends every five minutes is a problem all the time.
    """
    return min(max(first_s, 2 * ran_s), last_s)


class Problems:
    """The problems of one data directory. Each process, thread and room may make its own."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir.absolute() / "problems"
        with _lock:
            self._unwritten = _unwritten.setdefault(self._folder, {})

    def report(self, room: str, text: str, next_step: str) -> None:
        """`room` fails now. Each change is logged once; `since` stays the first failure's."""
        with _lock:
            before = self._unwritten.get(room) or self._read(room)
            since = before.since if before else datetime.now(UTC).isoformat(timespec="seconds")
            problem = Problem(room, _line(text), _line(next_step), since)
            if problem == before:
                return
            log.warning(
                "trouble",
                extra={"room": room, "problem": problem.text, "next_step": problem.next_step},
            )
            temporary = self._folder / f".{room}.{os.getpid()}.{threading.get_ident()}"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps(asdict(problem)))
                temporary.replace(self._folder / f"{room}.json")
                self._unwritten.pop(room, None)
            except OSError as error:
                self._unwritten[room] = problem
                log.warning("problem not written", extra={"room": room, "cause": str(error)})

    def clear(self, room: str) -> None:
        """`room` succeeded."""
        with _lock:
            before = self._unwritten.pop(room, None)
            try:
                (self._folder / f"{room}.json").unlink()
            except FileNotFoundError:
                if before is None:
                    return
            except OSError as error:
                if before is None:  # it is still there, and is removed at the next success
                    log.warning("problem not removed", extra={"room": room, "cause": str(error)})
                    return
            log.info("trouble is over", extra={"room": room})

    def current(self) -> list[Problem]:
        """Every room's problem, sorted by room."""
        try:
            rooms = {path.stem for path in self._folder.glob("[!.]*.json")}
        except OSError:
            rooms = set()
        read = {room: self._read(room) for room in rooms}
        found = {room: problem for room, problem in read.items() if problem is not None} | dict(
            self._unwritten
        )
        return [found[room] for room in sorted(found)]

    def unwritten(self) -> list[Problem]:
        """Those that the disk did not take: only this process knows them. Reads no disk."""
        return list(self._unwritten.values())

    def _read(self, room: str) -> Problem | None:
        try:
            fields = read_json(self._folder / f"{room}.json")
            return Problem(
                **{name: str(fields[name]) for name in ("room", "text", "next_step", "since")}
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _line(text: str) -> str:
    """One line of bounded length that any terminal and any message takes."""
    return "".join(character if character.isprintable() else " " for character in text)[
        :MAX_TEXT
    ].strip()
