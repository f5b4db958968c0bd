"""The node's figures, read from its stores and told to vLLM's process every few seconds.

In: the data directory, the supervisor's tally. Out: families `lorikeet_node_*` over the control
socket, where a scrape finds them in memory. So no scrape reads a disk on vLLM's event loop.
Guarantees: a part that cannot be read is left out and named; nothing here ends the node.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from cryptography import x509

from edge_node.disk import read_json
from edge_node.experience import ExperienceStore
from edge_node.figures.family import Family, counter, gauge
from edge_node.figures.tally import TALLY, Tally, last_heard
from edge_node.identity import Identity
from edge_node.learning.records import RoundStore
from edge_node.learning.reports import read_progress
from edge_node.outbox import Outbox
from edge_node.outbox.store import OutboxState
from edge_node.problems import Problems
from edge_node.serving import ControlClient

log = logging.getLogger(__name__)
PERIOD_S = 5.0
TELL_TIMEOUT_S = 5.0


class Engine(Protocol):
    """What is asked of the vLLM child."""

    generation: int


class Gatherer:
    """One per supervisor; `families` blocks on disk."""

    def __init__(
        self,
        data_dir: Path,
        identity: Identity,
        vllm: Engine,
        outbox: Outbox,
        experience: ExperienceStore,
        tally: Tally = TALLY,
    ) -> None:
        self._data_dir = data_dir
        self._identity = identity
        self._vllm = vllm
        self._outbox = outbox
        self._experience = experience
        self._tally = tally

    def families(self) -> list[Family]:
        """All that can be read now."""
        found: list[Family] = []
        unread: dict[str, float] = {}
        for part in (
            self._serving, self._releases, self._updates, self._learnt, self._rounds,
            self._problems, self._machine,
        ):  # fmt: skip
            name = part.__name__.strip("_")
            unread[name] = 0
            try:
                found += list(part())
            except Exception as error:  # one part must not hide the others
                unread[name] = 1
                log.debug("figures not read", extra={"part": name, "why": repr(error)})
        text = "1 while a part of the figures cannot be read."
        return found + gauge("figures_unread", text, unread, "part")

    def _serving(self) -> Iterator[Family]:
        tally = self._tally
        text = "Starts of vLLM since the supervisor's start; the first is one."
        yield from counter("engine_starts_total", text, self._vllm.generation)
        yield from counter("release_switches_total", "Switches of the alias.", tally.switches)
        text = "Time that all switches took, from the fetch to the re-pointing."
        yield from counter("release_switch_seconds_total", text, tally.switch_s)
        text = "Time that the last switch took."
        yield from gauge("release_last_switch_seconds", text, tally.last_switch_s)
        text = "Comparisons of a loaded release with its reference, by result."
        yield from counter("proofs_total", text, dict(tally.proofs), "result")

    def _releases(self) -> Iterator[Family]:
        file = self._data_dir / "releases" / "active.json"
        try:
            active = read_json(file)
        except FileNotFoundError:  # before the first release
            return
        label = str(active["label"])
        text = "1, with the release that the alias points at."
        yield from gauge("release_info", text, {label: 1}, "release")
        text = "Version number of that release."
        yield from gauge("release_version", text, int(label.partition("-")[0].removeprefix("v")))
        text = "When the node made it the active one, in seconds since 1970."
        yield from gauge("release_active_timestamp_seconds", text, file.stat().st_mtime)
        manifest = read_json(
            self._data_dir / "releases" / "versions" / str(active["release_id"]) / "manifest.json"
        )
        text = "When central made that release, in seconds since 1970."
        yield from gauge("release_created_timestamp_seconds", text, _time(manifest["created_at"]))

    def _updates(self) -> Iterator[Family]:
        entries = self._outbox.list()
        states = dict.fromkeys(map(str, OutboxState), 0.0)
        for entry in entries:
            states[entry.state] += 1
        yield from gauge("outbox_updates", "Updates in the outbox by state.", states, "state")
        unsent = [e for e in entries if e.state in (OutboxState.WAITING, OutboxState.HELD)]
        sizes = [_size(self._outbox.payload_path(entry.round_id)) for entry in unsent]
        text = "Bytes of the updates that wait or are held."
        yield from gauge("outbox_unsent_bytes", text, sum(sizes))
        text = "When the oldest update that waits was made, in seconds since 1970."
        waiting = [_time(e.created_at) for e in unsent if e.state is OutboxState.WAITING]
        yield from gauge(
            "outbox_oldest_waiting_timestamp_seconds", text, min(waiting, default=None)
        )

    def _learnt(self) -> Iterator[Family]:
        kept = self._experience.counts()
        yield from gauge("interactions", "Interactions in the store.", kept.interactions)
        yield from gauge("feedback", "Feedback in the store.", kept.feedback)
        yield from gauge("experiences", "Examples that can be learnt from.", kept.examples)
        text = "Answers with feedback that cannot be learnt from, by reason."
        yield from gauge("experiences_unusable", text, kept.unusable, "reason")
        yield from gauge("preferences", "Preferences that can be learnt from.", kept.preferences)
        text = "Scored groups that can be learnt from."
        yield from gauge("scored_groups", text, kept.scored_groups)

    def _rounds(self) -> Iterator[Family]:
        if not (self._data_dir / "learning" / "rounds.db").is_file():
            return
        rounds = RoundStore(self._data_dir / "learning", busy_timeout_s=1)
        outcomes = rounds.outcomes()
        running = outcomes.pop("training", 0)
        text = "Rounds that ended, by outcome."
        yield from counter("rounds_total", text, outcomes, "outcome")
        yield from gauge("round_running", "1 while a round trains.", running)
        for newest in rounds.ends(1):
            yield from self._newest(newest.plan.round_id)
            ended = None if running else _time(newest.changed_at)
            text = "When the last round ended, in seconds since 1970; none while one trains."
            yield from gauge("round_ended_timestamp_seconds", text, ended)

    def _newest(self, round_id: str) -> Iterator[Family]:
        progress = read_progress(self._data_dir, round_id)
        if progress is None:
            return
        logged = progress.newest()
        yield from gauge("round_steps_done", "Steps done of the newest round.", progress.step)
        yield from gauge("round_steps", "Steps that it has.", progress.steps)
        yield from gauge("round_train_seconds", "Time that it trained.", progress.seconds)
        yield from gauge("round_loss", "Loss of its last step.", logged.get("loss"))
        text = "Mean reward of its last step, where it has one."
        yield from gauge("round_reward", text, logged.get("reward"))
        text = "KL from the start release at its last step, in nats a token."
        yield from gauge("round_kl_release_nats", text, logged.get("kl_release"))
        text = "KL from the base at its last step, in nats a token."
        yield from gauge("round_kl_base_nats", text, logged.get("kl_base"))

    def _problems(self) -> Iterator[Family]:
        current = Problems(self._data_dir).current()
        yield from gauge("problems", "Rooms that fail now.", len(current))
        text = "1 while the room fails; `edge-node status` says why."
        yield from gauge("problem", text, {one.room: 1 for one in current}, "room")
        text = "Since when the room fails, in seconds since 1970."
        since = {one.room: _time(one.since) for one in current}
        yield from gauge("problem_since_timestamp_seconds", text, since, "room")

    def _machine(self) -> Iterator[Family]:
        disk = shutil.disk_usage(self._data_dir)
        yield from gauge("disk_free_bytes", "Free bytes on the disk of EDGE_DATA_DIR.", disk.free)
        yield from gauge("disk_size_bytes", "Size of that disk.", disk.total)
        certificate = x509.load_pem_x509_certificate(self._identity.certificate_pem)
        text = "When this node's certificate ends, in seconds since 1970."
        ends = certificate.not_valid_after_utc.timestamp()
        yield from gauge("certificate_expires_timestamp_seconds", text, ends)
        text = "When this node last heard of central, in seconds since 1970."
        yield from gauge("central_heard_timestamp_seconds", text, last_heard(self._data_dir))


async def tell(
    gather: Callable[[], list[Family]], control: ControlClient, period_s: float = PERIOD_S
) -> None:
    """Give vLLM's process the figures again and again, until cancelled."""
    while True:
        try:
            documents = [family.document() for family in await asyncio.to_thread(gather)]
            await control.tell_figures(documents, timeout_s=TELL_TIMEOUT_S)
        except Exception as error:  # vLLM is starting, or ends; its own room says so
            log.debug("figures not told", extra={"why": repr(error)})
        await asyncio.sleep(period_s)


def _time(at: Any) -> float:
    return datetime.fromisoformat(str(at)).timestamp()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # admitted meanwhile
        return 0
