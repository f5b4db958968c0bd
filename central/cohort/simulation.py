"""Central's loop on the virtual nodes of Flower's simulation (`flwr run`).

In: the Grid that Flower gives to a ServerApp. Out: a data directory like that of `central serve`:
releases, verdicts, a journal that `central releases verify` accepts. Between the two stands a
SimulationGrid: what a virtual node replies becomes an admitted update or a report in the journal,
and from there on nothing knows that it was simulated.

    Flower's Grid -> train replies -> update_admitted -> the loop (loop.py)
                  -> evaluation_offered -> Flower's Grid -> ...

Limits: virtual nodes hold no keys, so their updates are unsigned and pass no intake; a run that was
stopped is not resumed; replies must fit in memory, as everywhere in Flower.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from central.blobs import BlobStore, DirectoryBlobs
from central.cohort.errors import FederationError
from central.cohort.loop import CohortLoop, make_server_app
from central.cohort.offers import CohortGrid
from central.cohort.planning import SOFTWARE, plan_merge
from central.cohort.strategies.flower import check_strategy
from central.cohort.strategies.product_mean import CONFIG, to_arrays, to_tensors
from central.fleet.pki import Pki
from central.heads import Heads
from central.journal import EvaluationRecord, EventKind, Journal, NewEvent, ReleaseRecord, State
from central.releases import Registry
from central.settings import CentralSettings
from protos.lora import decode, encode
from protos.manifest import Payload, Start, UpdateManifest

log = logging.getLogger(__name__)

COHORT = "simulation"
TOKEN = "virtual-nodes"
POLL_S = 0.2
"""Pause between looks at Flower's replies."""
ARRAYS, METRICS, REPORT, NODE = "arrays", "metrics", "report", "node"
"""Records of messages to and from the node's ClientApp (edge_node/federation/client_app.py)."""


@dataclass(frozen=True)
class Round:
    """What one round of a simulation came to.

    Pass rates are fractions by environment of tasks; `before` is of the release that it started
    from. `release` is the label of the last candidate; it is empty, and there are no rates, when
    the round's updates made none.
    """

    number: int
    trained: int
    failed: int
    release: str
    accepted: bool
    text: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    seconds: float


class Watcher(Protocol):
    """Who is told how a simulation goes."""

    def on_progress(self, number: int, message_type: str, replied: int, asked: int) -> None:
        """Virtual nodes replied in round `number`."""

    def on_round(self, round: Round) -> None:
        """The loop decided on a round's candidate."""


def simulate(
    flower: Grid,
    context: Context,
    settings: CentralSettings,
    base: str,
    rounds: int,
    nodes_per_round: int,
    watcher: Watcher,
) -> None:
    """`rounds` times: virtual nodes train, the loop merges, and they judge the candidate.

    Args:
        settings: merge and gate policies; `data_dir` must be empty or absent.
        base: digest of the base model.
        watcher: is told what happens.

    Raises:
        SettingsError: a strategy that cannot work.
        FederationError: the directory is in use, or too few virtual nodes replied.
    """
    policy = settings.merge.policy(COHORT)
    check_strategy(policy.strategy, policy.strategy_options, policy.min_updates)
    if settings.data_dir.is_dir() and any(settings.data_dir.iterdir()):
        raise FederationError(
            f"{settings.data_dir} holds something already; name an empty directory."
        )
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    pki = Pki.load_or_create(settings.data_dir, [])
    blobs = _blobs(settings.data_dir / "blobs")
    heads = Heads(settings.data_dir, blobs, pki.release_key)
    journal = Journal(settings.journal_url, seals=heads)
    try:
        heads.start(journal)
        registry = Registry(journal, blobs, pki.release_key, base)
        registry.ensure_cohort(COHORT)
        stop = threading.Event()
        grid = SimulationGrid(
            flower, journal, blobs, settings, stop, rounds, nodes_per_round, watcher
        )
        loop_on = partial(CohortLoop, COHORT, journal, registry, blobs, settings)
        make_server_app(loop_on, stop)(grid, context)
    finally:
        journal.close()


class SimulationGrid(CohortGrid):
    """The grid of a simulation: an offer asks Flower's virtual nodes at once.

    Sets `stop` after the last round.
    """

    def __init__(
        self,
        flower: Grid,
        journal: Journal,
        blobs: BlobStore,
        settings: CentralSettings,
        stop: threading.Event,
        rounds: int,
        nodes_per_round: int,
        watcher: Watcher,
    ) -> None:
        super().__init__(COHORT, journal, stop)
        self._policy = settings.merge.policy(COHORT)
        self._flower = flower
        self._blobs = blobs
        self._rounds = rounds
        self._nodes_per_round = nodes_per_round
        self._watcher = watcher
        self._number = 0
        self._trained = self._failed = 0
        self._decided = 0
        """Verdicts before this round."""
        self._begun = time.monotonic()
        self._flower_ids: dict[str, int] = {}

    def offer_training(self, max_rank: int) -> None:
        """A round of training, unless an earlier one is still to be merged or judged."""
        with self._journal.read() as state:
            under_way = state.open_plans(COHORT) or plan_merge(
                state, COHORT, self._policy, self.clock()
            )
        if not under_way:
            self._next_round(max_rank)

    def offer_evaluation(self, body: dict[str, Any]) -> str:
        """Journal the offer, have the nodes evaluate, and journal what they report."""
        offer_id = uuid.uuid4().hex
        self._journal.append(NewEvent(EventKind.EVALUATION_OFFERED, COHORT, offer_id, body))
        with self._journal.read() as state:
            self._evaluate(state.evaluations[offer_id])
        return offer_id

    def _next_round(self, max_rank: int) -> None:
        with self._journal.read() as state:
            decided = [
                release for release in state.releases.values() if release.verdict is not None
            ]
            head = state.head(COHORT)
            why_none = self._why_no_candidate(state)
        if head is None:
            raise FederationError("The simulation's cohort has no release.")
        if self._number:
            last = decided[-1] if len(decided) > self._decided else None
            self._watcher.on_round(self._finished(last, why_none))
        self._decided = len(decided)
        if self._number == self._rounds:
            self._stop.set()
            return
        self._number += 1
        self._begun = time.monotonic()
        self._train(head, max_rank)

    def _why_no_candidate(self, state: State) -> str:
        """The text of a round whose updates made no candidate."""
        reasons = [
            update.reason
            for update in state.updates.values()
            if update.manifest.sequence == self._number and update.state == "set_aside"
        ]
        text = f"no candidate came of its {self._trained} updates"
        return f"{text}; {len(reasons)} set aside, the first: {reasons[0]}" if reasons else text

    def _finished(self, release: ReleaseRecord | None, why_none: str) -> Round:
        verdict = release.verdict if release else None
        figures: dict[str, Any] = verdict.environments if verdict else {}
        found = {name: c for name, c in figures.items() if "both" in c}
        return Round(
            number=self._number,
            trained=self._trained,
            failed=self._failed,
            release=release.manifest.label if release else "",
            accepted=release is not None and release.state == "accepted",
            text=verdict.text if verdict else why_none,
            before={
                name: (c["both"] + c["only_reference"]) / c["total"] for name, c in found.items()
            },
            after={
                name: (c["both"] + c["only_candidate"]) / c["total"] for name, c in found.items()
            },
            seconds=time.monotonic() - self._begun,
        )

    # Train.

    def _train(self, head: ReleaseRecord, max_rank: int) -> None:
        nodes = sorted(self._flower.get_node_ids())
        if self._nodes_per_round:
            draw = random.Random(f"{self._policy.seed}/{self._number}")
            nodes = draw.sample(nodes, min(self._nodes_per_round, len(nodes)))
        config = ConfigRecord({"round": self._number, "max_rank": max_rank})
        arrays = to_arrays(decode(self._blobs.read(head.manifest.payload.digest_sha256)))
        content = RecordDict({ARRAYS: arrays, CONFIG: config})
        replies = self._ask(nodes, MessageType.TRAIN, content)
        good = {_sender(reply): reply for reply in replies if not reply.has_error()}
        failures = [reply.error.reason for reply in replies if reply.has_error()]
        self._trained, self._failed = len(good), len(nodes) - len(good)
        if failures:
            log.warning(
                "virtual nodes failed", extra={"failed": self._failed, "first": failures[0]}
            )
        if self._trained < self._policy.min_updates:
            raise FederationError(
                f"{self._trained} of {len(nodes)} virtual nodes trained; a merge needs "
                f"{self._policy.min_updates}. "
                f"The first failure: {failures[0] if failures else 'no reply'}"
            )
        self._admit(head, good)

    def _admit(self, head: ReleaseRecord, replies: Mapping[str, Message]) -> None:
        """All updates in one transaction, by the nodes' names, so that a run can be repeated."""
        events: list[NewEvent] = []
        for name in sorted(replies, key=lambda name: (len(name), name)):
            reply, node_id = replies[name], f"virtual-{name}"
            if node_id not in self._flower_ids:
                events += self._enrolled(node_id, head.manifest.base)
            self._flower_ids[node_id] = reply.metadata.src_node_id
            manifest = self._manifest(head, node_id, reply.content)
            body = {"manifest": manifest.to_bytes().decode(), "signature": ""}
            events.append(NewEvent(EventKind.UPDATE_ADMITTED, COHORT, manifest.digest, body))
        self._journal.append(*events)

    def _enrolled(self, node_id: str, base: str) -> list[NewEvent]:
        events = []
        if not self._flower_ids:
            token = {
                "secret_sha256": "",
                "uses": 1 << 31,
                "expires_at": self.clock(),
                "by": "simulation",
            }
            events.append(NewEvent(EventKind.TOKEN_CREATED, COHORT, TOKEN, token))
        body = {
            "name": node_id,
            "token_id": TOKEN,
            "public_key_pem": "",
            "base": base,
            "certificate_sha256": "",
        }
        return [*events, NewEvent(EventKind.NODE_ENROLLED, COHORT, node_id, body)]

    def _manifest(self, head: ReleaseRecord, node_id: str, content: RecordDict) -> UpdateManifest:
        tensors = to_tensors(content[ARRAYS])
        data = encode(tensors)
        release = head.manifest
        metrics = {name: float(value) for name, value in content[METRICS].items()}
        return UpdateManifest(
            node_id=node_id,
            sequence=self._number,
            base=release.base,
            start=Start(
                release=head.release_id,
                payload=release.payload.digest_sha256,
                prefix_rank=release.rank,
                dtype="float32",
            ),
            rank=tensors.rank,
            payload=Payload(digest_sha256=self._blobs.put(data), size_bytes=len(data)),
            round_id=f"r{self._number:06d}-{release.label}",
            experiences=int(metrics.get("num-examples", 0)),
            metrics=metrics,
            created_at=self.clock(),
            software=SOFTWARE,
        )

    # Evaluate.

    def _evaluate(self, offer: EvaluationRecord) -> None:
        asked = {self._flower_ids[node]: node for node in offer.nodes}
        releases = sorted({offer.candidate, offer.reference, *offer.references.values()})
        with self._journal.read() as state:
            payloads = {
                release: state.releases[release].manifest.payload.digest_sha256
                for release in releases
            }
        records: dict[str, Any] = {
            f"{ARRAYS}/{r}": to_arrays(decode(self._blobs.read(d))) for r, d in payloads.items()
        }
        config = {
            "candidate": offer.candidate,
            "reference": offer.reference,
            "tasks": offer.tasks,
            "references": json.dumps(dict(offer.references)),
            "suites": json.dumps(
                {name: [suite.first_task, suite.tasks] for name, suite in offer.suites.items()}
            ),
        }
        content = RecordDict({**records, CONFIG: ConfigRecord(config)})
        replies = self._ask(asked, MessageType.EVALUATE, content)
        self._journal.append(
            *(self._reported(offer, asked[r.metadata.src_node_id], r) for r in replies)
        )

    def _reported(self, offer: EvaluationRecord, node_id: str, reply: Message) -> NewEvent:
        body = {"node_id": node_id, "results": [], "abstain_reason": ""}
        if reply.has_error():
            body["abstain_reason"] = reply.error.reason or "no reply"
        else:
            body["results"] = json.loads(str(reply.content[REPORT]["results"]))
        return NewEvent(EventKind.EVALUATION_REPORTED, COHORT, offer.offer_id, body)

    def _ask(self, nodes: Iterable[int], message_type: str, content: RecordDict) -> list[Message]:
        """Every node's reply; they come as Flower has them, and are counted on the way."""
        group = str(self._number)
        open_ids = set(
            self._flower.push_messages(
                Message(
                    content=content, dst_node_id=node, message_type=message_type, group_id=group
                )
                for node in nodes
            )
        )
        replies: list[Message] = []
        total = len(open_ids)
        while open_ids:
            came = list(self._flower.pull_messages(open_ids))
            replies += came
            open_ids.difference_update(reply.metadata.reply_to_message_id for reply in came)
            if came:
                self._watcher.on_progress(self._number, message_type, len(replies), total)
            else:
                time.sleep(POLL_S)
        return replies


def _blobs(root: Path) -> DirectoryBlobs:
    blobs = DirectoryBlobs(root)
    blobs.prepare()
    return blobs


def _sender(reply: Message) -> str:
    return str(reply.content[NODE]["name"])
