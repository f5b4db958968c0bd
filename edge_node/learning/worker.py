"""`python -m edge_node.learning.worker`: the learner, one long-lived process beside vLLM.

In: releases/active.json, releases/offer.json, experience.db. Out: updates in the outbox; the
working thread's beat (beat.py). It idles without torch; the training libraries are loaded once,
when a round is near. It holds no state of its own: killed at any point, the next one finds the
round in rounds.db and goes on from its newest valid checkpoint. It reads an operator's orders
there too (orders.py).
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import sqlite3
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

from edge_node import agent_runs, schedule
from edge_node.disk import read_json
from edge_node.errors import AdapterError, EdgeError, EnvironmentFault, StorageError
from edge_node.experience import Counts, open_experience
from edge_node.learning.beat import LOOK_S, Beat
from edge_node.learning.orders import Orders, RoundCancelled
from edge_node.learning.plans import RoundPlan, plan_round
from edge_node.learning.policy import Decision, NothingToLearnFrom, Signals, decide, method_for
from edge_node.learning.records import NoGain, NoReward, NothingToGain, RoundImpossible, RoundStore
from edge_node.learning.signals import group_sizes, read_signals
from edge_node.learning.steering import NodeSteering, RoundPaused
from edge_node.problems import Problems
from edge_node.releases.peft_directory import directory_rank
from edge_node.releases.trouble import next_step
from edge_node.settings import EdgeSettings, load_settings
from edge_node.tracing import start_traces, trace_round
from lorikeet.logs import log_to_stderr
from lorikeet.parent import die_with_parent
from lorikeet.pauses import doubling
from protos.encoding import Encoding
from protos.manifest import ManifestError, ReleaseManifest

log = logging.getLogger("edge_node.learning")

FIRST_WAIT_S = 1.0
LAST_WAIT_S = 60.0
"""Pauses between two tries of a round whose environment does not work; they double."""
GAINLESS_ROUNDS = 3
"""So many rounds from one release without gain, each on other tasks, are the last ones from it."""
ROOM = "learning"
"""Name under which rounds report problems."""


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
        self._rounds.clear_workspaces()
        self._orders = Orders(self._rounds)
        self._experience = open_experience(settings)
        self._problems = Problems(settings.data_dir)
        self._problems.clear(agent_runs.ROOM)  # its environment may be gone from the settings
        self._beat = Beat(settings.data_dir)
        self._beat.touch()
        self._explorable = [spec.name for spec in settings.environments if spec.rollouts]
        self._warm: threading.Thread | None = None
        self._waits = doubling(FIRST_WAIT_S, LAST_WAIT_S)

    def run(self) -> None:
        """Until the process is stopped."""
        while True:
            if not self.step():
                self._rest(self._settings.learning.poll_s)

    def _rest(self, pause_s: float) -> None:
        """Sleeps `pause_s`, in pieces, as it may be longer than the supervisor waits."""
        ends = time.monotonic() + pause_s
        while (left := ends - time.monotonic()) > 0:
            self._beat.touch()
            time.sleep(min(left, LOOK_S))

    def step(self) -> bool:
        """Run the round that is due, if any; True when one ran."""
        plan = self._rounds.unfinished() or self._next_round()
        if plan is None or not schedule.is_open(self._settings.learning.schedule):
            return False
        self._train(plan)
        return True

    def _next_round(self) -> RoundPlan | None:
        active = read_active(self._settings.data_dir)
        if active is None:
            return None
        learning = self._settings.learning
        max_rank = read_max_rank(self._settings.data_dir)
        last = self._rounds.last()
        counts = self._experience.counts()
        misfit = find_misfit(self._settings, active, max_rank)
        explored = [] if misfit else self._explorable
        self._report(counts, misfit)
        model = f"{self._settings.serving.alias}@{active.label}"
        cursors = self._rounds.cursors()
        signals = replace(
            read_signals(
                self._experience, counts, self._rounds, cursors, active.manifest.digest, model
            ),
            rollouts=len(explored),
        )
        decision = decide(learning, signals)
        if decision.warm and self._warm is None:
            self._warm = threading.Thread(target=_load_training, name="load-training", daemon=True)
            self._warm.start()
        if (wanted := self._wanted(signals, misfit)) is not None:
            decision = wanted
        if not decision.start or not schedule.is_open(learning.schedule):
            return None
        cursor, scored = self._experience.cursor(), decision.method == "scored"
        plan = plan_round(
            learning,
            number=last.number + 1 if last else 1,
            node_id=self._node_id,
            release=active.manifest,
            prefix_rank=active.rank,
            # What feedback says is left for an sft round.
            cursor=cursors["sft"] if decision.method == "grpo" else cursor,
            method=decision.method,
            deleted=self._experience.deleted(up_to=cursor),
            explored=explored if decision.method == "grpo" else [],
            groups=group_sizes(
                self._experience, cursor, cursors["scored"], model, learning.max_examples
            )
            if scored
            else None,
            max_rank=max_rank,
            encoding=read_encoding(self._settings.data_dir, self._settings.outbox.encoding),
            warm_cursor=cursor
            if decision.method == "grpo" and self._rounds.unrewarded(active.manifest.digest)
            else None,
        )
        self._rounds.begin(plan)
        return plan

    def _wanted(self, signals: Signals, misfit: str) -> Decision | None:
        """What an operator asked for; the wish is dropped when it has become impossible."""
        wish = self._orders.wish()
        if wish is None:
            return None
        try:
            method = method_for(self._settings.learning, wish.method, signals, misfit)
        except NothingToLearnFrom as error:
            log.warning("the round that was asked for cannot start", extra={"why": str(error)})
            self._orders.withdraw()
            return None
        return Decision(start=True, warm=True, method=method)

    def _report(self, counts: Counts, misfit: str) -> None:
        """Say that too little can be learnt from, or that nothing is wrong.

        An abandoned round stays a problem until another one is finished.
        """
        if self._rounds.last_was_abandoned():
            return
        needed = self._settings.learning.min_examples
        if counts.examples < needed <= counts.examples + sum(counts.unusable.values()):
            reasons = "; ".join(
                f"{count} because {reason}" for reason, count in counts.unusable.items()
            )
            self._problems.report(
                ROOM,
                f"No round can start: {counts.examples} corrected or verified answers can be "
                f"learnt from, a round needs {needed}, and others cannot be used: {reasons}.",
                "See `reason` in the answers of POST /v1/feedback, and "
                "edge_node/experience/README.md.",
            )
        elif misfit:
            self._problems.report(
                ROOM,
                misfit,
                "Raise EDGE_SERVING__MAX_LORA_RANK, lower EDGE_LEARNING__RANK or "
                "EDGE_RELEASES__MAX_RANK, or set EDGE_LEARNING__METHOD to sft; then restart the "
                "node.",
            )
        else:
            self._problems.clear(ROOM)

    def _train(self, plan: RoundPlan) -> None:
        from edge_node.learning.round import run_round
        from edge_node.learning.training import RoundObsolete
        from edge_node.outbox import Outbox

        log.info(
            "round starts",
            extra={"round_id": plan.round_id, "release": plan.label, "rank": plan.rank},
        )
        outbox = Outbox(self._settings.data_dir / "outbox", self._settings.outbox.approval)
        steering = NodeSteering(self._settings, self._rounds, plan, self._beat.touch)
        try:
            update_id = run_round(
                plan,
                self._settings,
                outbox,
                self._rounds.workspace(plan.round_id),
                active=self._active_id,
                beat=self._beat.touch,
                steering=steering,
            )
        except RoundCancelled:
            log.info("round cancelled by an operator", extra={"round_id": plan.round_id})
            self._rounds.clear_workspaces()
            return
        except RoundPaused as error:
            log.info(
                "round paused, no window of its schedule is open",
                extra={"round_id": plan.round_id, "at": str(error)},
            )
            gc.collect()  # a model, which nobody needs for hours
            return
        except RoundObsolete as error:
            log.info(
                "round given up, its update would be of no use",
                extra={"round_id": plan.round_id, "at": str(error)},
            )
            self._rounds.drop(plan.round_id, str(error))
            return
        except NoGain as error:
            log.info("round gained nothing", extra={"round_id": plan.round_id, "why": str(error)})
            self._end_without_gain(plan, error)
            self._problems.clear(ROOM)
            return
        except EnvironmentFault as error:  # it may be over at the next try, as the plan is kept
            text = f"Round {plan.round_id} waits for an environment. {error}"
            self._problems.report(ROOM, text, next_step(error))
            self._rest(next(self._waits))
            return
        except (EdgeError, OSError, sqlite3.Error):
            raise  # the node's surroundings, not the round: it goes on once they are right
        except Exception as error:  # supervision: it would fail again, and no other could start
            # Not its words, which may quote what a customer wrote: they are in rounds.db.
            at = traceback.extract_tb(error.__traceback__)[-1]
            fields = {
                "round_id": plan.round_id,
                "why": type(error).__name__,
                "at": f"{at.filename}:{at.lineno}",
            }
            log.error("round abandoned", extra=fields)
            where = f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}."
            text = str(error) if isinstance(error, RoundImpossible) else where
            self._problems.report(
                ROOM, f"Round {plan.round_id} was abandoned: {text}", _next_step(error)
            )
            self._rounds.abandon(plan.round_id, repr(error))
            return
        finally:
            steering.ends()
        self._waits = doubling(FIRST_WAIT_S, LAST_WAIT_S)
        self._rounds.finish(plan.round_id, update_id)
        trace_round(plan, update_id)
        self._problems.clear(ROOM)
        log.info("round finished", extra={"round_id": plan.round_id, "update_id": update_id})

    def _end_without_gain(self, plan: RoundPlan, error: NoGain) -> None:
        warms = self._settings.learning.grpo.warm_steps > 0
        if plan.method != "grpo":
            self._rounds.give_up(plan.round_id, str(error))
        elif isinstance(error, NoReward) and warms and plan.grpo and plan.grpo.warm is None:
            self._rounds.end_unrewarded(plan.round_id, str(error))
        elif isinstance(error, NothingToGain):
            self._rounds.saturate(plan.round_id, str(error))
        elif self._rounds.given_up(plan.release_id) + 1 < GAINLESS_ROUNDS:
            self._rounds.give_up(plan.round_id, str(error))
        else:
            text = f"{error}; it was the last of {GAINLESS_ROUNDS} rounds from this release"
            self._rounds.saturate(plan.round_id, text)

    def _active_id(self) -> str | None:
        active = read_active(self._settings.data_dir)
        return None if active is None else active.manifest.digest


def _next_step(error: Exception) -> str:
    if isinstance(error, RoundImpossible):
        return error.next_step
    return (
        "Look at the error in learning/rounds.db. When memory is short, set "
        "EDGE_LEARNING__BATCH_TOKENS lower and EDGE_LEARNING__GRADIENT_CHECKPOINTING to true. The "
        "next round starts by itself after further feedback."
    )


def find_misfit(settings: EdgeSettings, active: ActiveRelease, max_rank: int | None) -> str:
    """Why vLLM cannot serve the policy of a grpo round from this release; empty when it can, or
    when there would be no such round.
    """
    rank = min(settings.learning.rank, max_rank or settings.learning.rank)
    most = settings.serving.max_lora_rank
    has_rollouts = any(spec.rollouts for spec in settings.environments)
    explores = has_rollouts and settings.learning.method in ("auto", "grpo")
    if not explores or active.rank + rank <= most:
        return ""
    return (
        f"No grpo round can start: release {active.label} has rank {active.rank}, a round adds "
        f"{rank}, and this node serves adapters up to rank {most}."
    )


def read_active(data_dir: Path) -> ActiveRelease | None:
    """The release that the alias points at; None when there is none yet.

    Raises StorageError when it is damaged.
    """
    path = data_dir / "releases" / "active.json"
    try:
        document = read_json(path)
        folder = data_dir / "releases" / "versions" / str(document["release_id"])
        manifest = ReleaseManifest.from_bytes((folder / "manifest.json").read_bytes())
        return ActiveRelease(
            manifest, str(document["label"]), min(manifest.rank, directory_rank(folder))
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ManifestError, AdapterError) as error:
        raise StorageError(
            f"The active release in {path} cannot be read: {error}. Restart the node's supervisor."
        ) from error


def read_max_rank(data_dir: Path) -> int | None:
    """Largest rank of an update that central's offer admits; None before the first offer."""
    try:
        return int(read_json(data_dir / "releases" / "offer.json")["max_rank"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_encoding(data_dir: Path, wanted: Encoding) -> Encoding:
    """`wanted` where central's offer names it; float32, which every central reads, otherwise."""
    try:
        offered = read_json(data_dir / "releases" / "offer.json")["encodings"]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or that of an older central
        return "float32"
    return wanted if wanted in offered else "float32"


def _load_training() -> None:
    try:
        importlib.import_module("edge_node.learning.round")
    except Exception:  # supervision: the round itself imports it again and reports
        log.exception("training libraries cannot be loaded")


def main(arguments: list[str] | None = None) -> int:
    """Exit codes are those of edge_node.errors."""
    parser = argparse.ArgumentParser(
        prog="python -m edge_node.learning.worker", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--parent", type=int, help="exit when this process is not the parent any more"
    )
    options = parser.parse_args(arguments)
    if options.parent is not None:
        die_with_parent(options.parent)
    log_to_stderr()
    try:
        settings = load_settings()
        log_to_stderr(settings.logs.format)
        start_traces(settings, "learner")
        from edge_node.identity import Identity

        Worker(settings, Identity.load(settings.data_dir).node_id).run()
    except EdgeError as error:
        print(f"learner: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, sqlite3.Error) as error:
        print(
            f"learner: the disk of EDGE_DATA_DIR cannot be used: {error}. Free space, or check it.",
            file=sys.stderr,
        )
        return StorageError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
