"""`python -m edge_node.learning.worker`: the learner, one long-lived process beside vLLM.

In: releases/active.json, releases/offer.json, experience.db. Out: updates in the outbox. It idles without torch; the
training libraries are loaded once, when a round is near. It holds no state of its own: killed at any point, the next
one finds the round in rounds.db and goes on from its newest valid checkpoint.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import logging
import os
import signal
import sqlite3
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from edge_node.errors import AdapterError, EdgeError, StorageError
from edge_node.experience import Counts, ExperienceStore
from edge_node.learning.policy import Signals, decide
from edge_node.learning.records import RoundImpossible, RoundPlan, RoundStore, plan_round
from edge_node.logs import log_to_stderr
from edge_node.problems import Problems
from edge_node.releases.peft_directory import directory_rank
from edge_node.settings import EdgeSettings, load_settings
from protos.manifest import ManifestError, ReleaseManifest

log = logging.getLogger("edge_node.learning")

ROOM = "learning"
"""Name under which rounds report problems."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ActiveRelease:
    """What the node serves now."""

    manifest: ReleaseManifest
    label: str
    rank: int
    """Of the prefix that is on disk; the release's own when whole."""


class Worker:
    """Polls, decides, trains; one round at a time."""

    def __init__(self, settings: EdgeSettings, node_id: str) -> None:
        self._settings = settings
        self._node_id = node_id
        self._rounds = RoundStore(settings.data_dir / "learning")
        self._experience = ExperienceStore(settings.data_dir / "experience.db")
        self._problems = Problems(settings.data_dir)
        self._warm: threading.Thread | None = None

    def run(self) -> None:
        """Until the process is stopped."""
        while True:
            if not self.step():
                time.sleep(self._settings.learning.poll_s)

    def step(self) -> bool:
        """Run the round that is due, if any; True when one ran."""
        plan = self._rounds.unfinished() or self._next_round()
        if plan is None:
            return False
        self._train(plan)
        return True

    def _next_round(self) -> RoundPlan | None:
        active = read_active(self._settings.data_dir)
        if active is None:
            return None
        learning = self._settings.learning
        last = self._rounds.last()
        counts = self._experience.counts()
        self._report(counts)
        model = f"{self._settings.serving.alias}@{active.label}"
        cursor = last.cursor if last else 0
        decision = decide(
            learning,
            Signals(
                examples=counts.examples,
                new_failures=self._experience.failures(after=cursor, model=model),
                new_feedback=self._experience.judged(after=cursor, model=model),
                same_start_age_s=last.age_s() if last and last.release_id == active.manifest.digest else None,
            ),
        )
        if decision.warm and self._warm is None:
            self._warm = threading.Thread(target=_load_training, name="load-training", daemon=True)
            self._warm.start()
        if not decision.start:
            return None
        plan = plan_round(
            learning,
            number=last.number + 1 if last else 1,
            node_id=self._node_id,
            release=active.manifest,
            prefix_rank=active.rank,
            cursor=self._experience.cursor(),
            max_rank=read_max_rank(self._settings.data_dir),
        )
        self._rounds.begin(plan)
        return plan

    def _report(self, counts: Counts) -> None:
        """Say that too little can be learnt from, or that nothing is wrong. An abandoned round
        stays a problem until another one is finished.
        """
        if self._rounds.last_was_abandoned():
            return
        needed = self._settings.learning.min_examples
        if counts.examples < needed <= counts.examples + sum(counts.unusable.values()):
            reasons = "; ".join(f"{count} because {reason}" for reason, count in counts.unusable.items())
            self._problems.report(
                ROOM,
                f"No round can start: {counts.examples} corrected or verified answers can be learnt from, a round needs "
                f"{needed}, and others cannot be used: {reasons}.",
                "See `reason` in the answers of POST /v1/feedback, and edge_node/experience/README.md.",
            )
        else:
            self._problems.clear(ROOM)

    def _train(self, plan: RoundPlan) -> None:
        from edge_node.learning.round import run_round
        from edge_node.learning.training import RoundObsolete
        from edge_node.outbox import Outbox

        log.info("round starts", extra={"round_id": plan.round_id, "release": plan.label, "rank": plan.rank})
        outbox = Outbox(self._settings.data_dir / "outbox", self._settings.outbox.approval)
        try:
            update_id = run_round(
                plan, self._settings, outbox, self._rounds.workspace(plan.round_id), active=self._active_id
            )
        except RoundObsolete as error:
            log.info("round given up, a newer release is active", extra={"round_id": plan.round_id, "at": str(error)})
            self._rounds.give_up(plan.round_id, f"obsolete {error}")
            return
        except (EdgeError, OSError, sqlite3.Error):
            raise  # the node's surroundings, not the round: it goes on once they are right
        except Exception as error:  # supervision: the same round would fail again, and no other could start
            # Not its words, which may quote what a customer wrote: they are in rounds.db.
            at = traceback.extract_tb(error.__traceback__)[-1]
            fields = {"round_id": plan.round_id, "why": type(error).__name__, "at": f"{at.filename}:{at.lineno}"}
            log.error("round abandoned", extra=fields)
            where = f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}."
            text = str(error) if isinstance(error, RoundImpossible) else where
            self._problems.report(ROOM, f"Round {plan.round_id} was abandoned: {text}", _next_step(error))
            self._rounds.abandon(plan.round_id, repr(error))
            return
        self._rounds.finish(plan.round_id, update_id)
        self._problems.clear(ROOM)
        log.info("round finished", extra={"round_id": plan.round_id, "update_id": update_id})

    def _active_id(self) -> str | None:
        active = read_active(self._settings.data_dir)
        return None if active is None else active.manifest.digest


def _next_step(error: Exception) -> str:
    if isinstance(error, RoundImpossible):
        return error.next_step
    return (
        "Look at the error in learning/rounds.db. When memory is short, lower EDGE_LEARNING__BATCH_OWN and "
        "EDGE_LEARNING__BATCH_ANCHOR. The next round starts by itself after further feedback."
    )


def read_active(data_dir: Path) -> ActiveRelease | None:
    """The release that the alias points at; None when there is none yet. Raises StorageError when it is damaged."""
    path = data_dir / "releases" / "active.json"
    try:
        document = json.loads(path.read_bytes())
        folder = data_dir / "releases" / "versions" / str(document["release_id"])
        manifest = ReleaseManifest.from_bytes((folder / "manifest.json").read_bytes())
        return ActiveRelease(manifest, str(document["label"]), min(manifest.rank, directory_rank(folder)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ManifestError, AdapterError) as error:
        raise StorageError(
            f"The active release in {path} cannot be read: {error}. Restart the node's supervisor."
        ) from error


def read_max_rank(data_dir: Path) -> int | None:
    """Largest rank of an update that central's standing offer admits; None before the first offer."""
    try:
        return int(json.loads((data_dir / "releases" / "offer.json").read_bytes())["max_rank"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _load_training() -> None:
    try:
        importlib.import_module("edge_node.learning.round")
    except Exception:  # supervision: the round itself imports it again and reports
        log.exception("training libraries cannot be loaded")


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent dies, and end it now when that has happened already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes are those of edge_node.errors."""
    parser = argparse.ArgumentParser(prog="python -m edge_node.learning.worker", description=__doc__.splitlines()[0])
    parser.add_argument("--parent", type=int, help="exit when this process is not the parent any more")
    options = parser.parse_args(arguments)
    if options.parent is not None:
        die_with_parent(options.parent)
    log_to_stderr()
    try:
        settings = load_settings()
        from edge_node.identity import Identity

        Worker(settings, Identity.load(settings.data_dir).node_id).run()
    except EdgeError as error:
        print(f"learner: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, sqlite3.Error) as error:
        print(f"learner: the disk of EDGE_DATA_DIR cannot be used: {error}. Free space, or check it.", file=sys.stderr)
        return StorageError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
