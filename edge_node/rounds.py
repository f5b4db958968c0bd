"""The node's rounds as a person sees them, and what a person may ask of them.

In: settings; rounds.db, reports and the outbox, whether the node runs or not. Out: plain records
without a word that a customer wrote; an order on disk. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edge_node import schedule
from edge_node.experience import open_experience
from edge_node.heartbeat import is_alive
from edge_node.identity import Identity
from edge_node.learning.orders import OrderRefused, Orders, Wish
from edge_node.learning.policy import Method, NothingToLearnFrom, method_for
from edge_node.learning.records import RoundEnd, RoundStore
from edge_node.learning.reports import Progress, read_progress, report_folder
from edge_node.learning.signals import read_signals
from edge_node.learning.worker import find_misfit, read_active, read_max_rank
from edge_node.outbox import Outbox
from edge_node.settings import EdgeSettings
from protos.manifest import UpdateManifest

GATE = ("held_out_", "anchor_", "texts_", "gate_")
"""Beginnings of the names of what the local gate measured."""
WITHOUT_UPDATE = ("given up", "no reward", "nothing to gain", "cancelled")
"""How a round ends that sends nothing; the words of an abandoned one may quote a customer."""


@dataclass(frozen=True)
class RoundLine:
    """A round in a list. steps_done: of the plan's; None when nobody knows any more. result: update
    id or why.
    """

    number: int
    round_id: str
    method: str
    release: str
    state: str
    begun: str
    steps_done: int | None
    steps: int
    result: str


def list_rounds(settings: EdgeSettings) -> list[RoundLine]:
    """Every round, newest first; raises as `open_rounds`."""
    return [_line(settings, end) for end in open_rounds(settings).ends()]


def open_wish(settings: EdgeSettings) -> Wish | None:
    """The round that was asked for and has not begun; raises as `open_rounds`."""
    return Orders(open_rounds(settings)).wish()


def show_round(settings: EdgeSettings, name: str) -> dict[str, Any]:
    """All that is known of one round.

    Args:
        name: its number, its id, or the first characters of that.

    Raises:
        OrderRefused: none, or several, have that name. Others as `open_rounds`.
    """
    end = find_round(settings, name)
    progress = read_progress(settings.data_dir, end.plan.round_id)
    metrics = _manifest_metrics(settings, end.plan.round_id)
    folder = report_folder(settings.data_dir, end.plan.round_id)
    return asdict(_line(settings, end)) | {
        "ended": None if end.state == "training" else end.changed_at,
        "plan": end.plan.model_dump(mode="json"),
        "environments": end.plan.grpo.environments if end.plan.grpo else _anchors(settings, end),
        "progress": progress and _without_entries(progress),
        "metrics": {key: value for key, value in metrics.items() if not key.startswith(GATE)},
        "gate": {key: value for key, value in metrics.items() if key.startswith(GATE)},
        "report": _if_there(folder / "progress.json"),
        "tensorboard": _if_there(folder / "tensorboard"),
    }


def find_round(settings: EdgeSettings, name: str) -> RoundEnd:
    """As `show_round`."""
    ends = open_rounds(settings).ends() if name else []
    found = [end for end in ends if name in (str(end.plan.number), end.plan.round_id)] or [
        end for end in ends if end.plan.round_id.startswith(name)
    ]
    if len(found) != 1:
        raise OrderRefused(
            f"{len(found)} rounds match {name!r}; expected exactly one. See `edge-node rounds "
            "list`."
        )
    return found[0]


def ask_for_round(settings: EdgeSettings, asked: Method | None) -> dict[str, Any]:
    """Have the learner start a round, whatever thresholds and waits the policy has.

    Raises OrderRefused while a round runs, NothingToLearnFrom; others as `open_rounds`.
    """
    rounds = open_rounds(settings)
    if not settings.learning.enabled:
        raise NothingToLearnFrom(
            "EDGE_LEARNING__ENABLED is false, so this node never trains. Set it to true and "
            "restart the node."
        )
    active = read_active(settings.data_dir)
    if active is None:
        raise NothingToLearnFrom(
            "This node has no release yet, and a round starts from one. Start it with `edge-node "
            "serve`, and look at `edge-node status`."
        )
    experience = open_experience(settings)
    signals = read_signals(
        experience,
        experience.counts(),
        rounds,
        rounds.cursors(),
        active.manifest.digest,
        f"{settings.serving.alias}@{active.label}",
    )
    signals = replace(signals, rollouts=sum(spec.rollouts for spec in settings.environments))
    misfit = find_misfit(settings, active, read_max_rank(settings.data_dir))
    method = method_for(settings.learning, asked, signals, misfit)
    Orders(rounds).want(method)
    return {"method": method, "release": active.label, "starts": _starts(settings)}


def cancel_round(settings: EdgeSettings, name: str | None) -> str | None:
    """End the round `name`, or the one that runs; its id. Without either, take back the wish for
    one; None.

    Raises OrderRefused when there is none, or it has ended; others as `open_rounds`.
    """
    rounds = open_rounds(settings)
    orders = Orders(rounds)
    plan = rounds.unfinished() if name is None else find_round(settings, name).plan
    if plan is None:
        if orders.withdraw():
            return None
        raise OrderRefused("No round runs, and none was asked for. See `edge-node rounds list`.")
    orders.cancel(plan, lambda round_id: _outbox(settings).of_round(round_id) is not None)
    return plan.round_id


def newest_round(data_dir: Path, *, busy_timeout_s: float) -> dict[str, Any]:
    """For status. last_round: the newest one, how it learns, how it stands, and why if it sent
    nothing. round: the progress of one that runs; None without one.
    """
    nothing = {"last_round": None, "round": None}
    if not (data_dir / "learning" / "rounds.db").is_file():
        return nothing
    ends = RoundStore(data_dir / "learning", busy_timeout_s=busy_timeout_s).ends(1)
    if not ends:
        return nothing
    (end,) = ends
    why = f": {end.result}" if end.state in WITHOUT_UPDATE else ""
    progress = read_progress(data_dir, end.plan.round_id) if end.state == "training" else None
    return {
        "last_round": f"{end.plan.round_id} ({end.plan.method}) {end.state}{why}",
        "round": progress and {"round_id": end.plan.round_id} | _without_entries(progress),
    }


def open_rounds(settings: EdgeSettings) -> RoundStore:
    """Raises EnrollmentError when the node is not enrolled, StorageError."""
    # A mistyped EDGE_DATA_DIR must not look like a node that never learnt.
    Identity.load(settings.data_dir)
    return RoundStore(settings.data_dir / "learning")


def _line(settings: EdgeSettings, end: RoundEnd) -> RoundLine:
    progress = read_progress(settings.data_dir, end.plan.round_id)
    done = None if progress is None else 0 if progress.stage else progress.step
    # The words of an error may quote what a customer wrote; its name does not.
    result = end.result.partition("(")[0] if end.state == "abandoned" else end.result
    return RoundLine(
        number=end.plan.number,
        round_id=end.plan.round_id,
        method=end.plan.method,
        release=end.plan.label,
        state=end.state,
        begun=end.plan.created_at,
        steps_done=done,
        steps=end.plan.steps,
        result=result,
    )


def _manifest_metrics(settings: EdgeSettings, round_id: str) -> dict[str, float]:
    outbox = _outbox(settings)
    entry = outbox.of_round(round_id)
    if entry is None:
        return {}
    return dict(UpdateManifest.from_bytes(outbox.signed(entry.update_id)[0]).metrics)


def _anchors(settings: EdgeSettings, end: RoundEnd) -> list[str]:
    if end.plan.anchors is not None or not end.plan.batch_anchor:
        return []
    return [spec.name for spec in settings.environments if spec.anchor]


def _without_entries(progress: Progress) -> dict[str, Any]:
    document = asdict(progress)
    del document["entries"]
    return document | progress.newest()


def _if_there(path: Path) -> str | None:
    return str(path) if path.exists() else None


def _outbox(settings: EdgeSettings) -> Outbox:
    return Outbox(settings.data_dir / "outbox", settings.outbox.approval)


def _starts(settings: EdgeSettings) -> str:
    if not is_alive(settings.data_dir):
        return "when the node runs"
    if not schedule.is_open(settings.learning.schedule):
        return "in the next window of EDGE_LEARNING__SCHEDULE"
    return "now"
