"""A Flower Grid over the journal: messages become durable offers, admitted updates and reports become replies.

In: train and evaluate messages of a strategy. Out: reply messages. Guarantees: what was pushed is in the journal, so that a
restart resumes it instead of repeating it; pulling train replies journals the merge plan before anything is merged, and
pulls the same replies again until that plan is decided; a grid sees one cohort and nothing else.

    push_messages(TRAIN)      -> train_offered, once: it stands for the cohort, whoever joins later
    pull_messages(train)      -> waits for the merge policy -> merge_planned -> one reply per update, by digest
    push_messages(EVALUATE)   -> evaluation_offered, unless an offer for that look at the candidate is still open
    pull_messages(evaluate)   -> waits for the reports or the deadline -> one reply per report, an error per abstention
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from flwr.app import DEFAULT_TTL, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from central.federation.errors import FederationError, LostUpdate, UnusableUpdate
from central.federation.looks import Ask, is_result, offers_of, reports_of_look
from central.federation.patience import Patience
from central.federation.planning import parse_time, plan_merge, still_stands
from central.federation.replies import flower_id, request, train_replies
from central.federation.soaking import SoakWatch
from central.federation.strategy import CONFIG, REPORT
from central.journal import (
    EvaluationRecord,
    EvaluationReport,
    EventKind,
    Journal,
    MergePlan,
    NewEvent,
    PlanRecord,
    State,
)
from central.settings import CentralSettings
from protos.manifest import canonical_json

T = TypeVar("T")
log = logging.getLogger(__name__)

ABSTAINED = 1
"""Error code of a reply whose node could not evaluate."""
STOP_CHECK_S = 1.0
"""Longest time until `stop`, an age or a deadline is seen."""


@dataclass(frozen=True)
class _Ready:
    """A plan in the journal that has no verdict; None of a draft."""

    planned: PlanRecord | None


@dataclass(frozen=True)
class _Draft(_Ready):
    """A plan whose updates are to be filtered first."""

    plan: MergePlan


class JournalGrid(Grid):  # type: ignore[misc]
    """One per cohort, used by one thread. `stop` ends every wait; a pull that was stopped returns nothing.

    `is_connected` says of a node id whether the node can hear us now: reports of others are not waited for beyond
    the gate's grace. `screen` filters a drafted plan (screening.py); None: what is due is merged. `went_on` is called whenever the
    grid has nothing to do but wait: what failed before is past.
    """

    def __init__(
        self,
        cohort: str,
        journal: Journal,
        settings: CentralSettings,
        stop: threading.Event,
        is_connected: Callable[[str], bool] = lambda node_id: True,
        clock: Callable[[], str] | None = None,
        screen: Callable[[MergePlan, str], MergePlan] | None = None,
        went_on: Callable[[], None] = lambda: None,
    ) -> None:
        self._screen = screen
        self._went_on = went_on
        self._cohort = cohort
        self._journal = journal
        self._policy = settings.merge.policy(cohort)
        self._gate = settings.gate
        self._stop = stop
        self._clock = clock = clock or journal.clock
        self._patience = Patience(settings.gate, is_connected, clock)
        self._soak = SoakWatch(cohort, journal, settings.channels.policy(cohort), is_connected, clock)
        self._run: Any = None

    # Flower's seven methods.

    def set_run(self, run: Any) -> None:
        """Keep Flower's description of the run; ours has none."""
        self._run = run

    @property
    def run(self) -> Any:
        """What `set_run` was given; raises FederationError before."""
        if self._run is None:
            raise FederationError("No Flower run is set on this grid; central runs its ServerApp outside of one.")
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message that `push_messages` takes."""
        return Message(
            content=content,
            dst_node_id=dst_node_id,
            message_type=message_type,
            group_id=group_id,
            ttl=ttl or DEFAULT_TTL,
        )

    def get_node_ids(self) -> Iterable[int]:
        """Flower's numbers for the cohort's nodes that are not revoked."""
        with self._journal.read() as state:
            return [flower_id(node_id) for node_id in state.members(self._cohort)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Make the messages durable offers; returns the ids of the offers that stand for them."""
        ids: list[str] = []
        evaluate: list[Message] = []
        for message in messages:
            if message.metadata.message_type == MessageType.TRAIN:
                config = message.content[CONFIG]
                ids.append(self._offer_training(int(config["max_rank"])))
            elif message.metadata.message_type == MessageType.EVALUATE:
                evaluate.append(message)
            else:
                raise FederationError(
                    f"Message type {message.metadata.message_type!r} has no offer; expected train or evaluate."
                )
        if evaluate:
            ids.append(self._offer_evaluation(evaluate))
        return list(dict.fromkeys(ids))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Wait for the replies to these offers; nothing when stopped."""
        return self._pull(message_ids, None)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """`push_messages`, then `pull_messages` for at most `timeout` seconds."""
        return self._pull(self.push_messages(messages), timeout)

    # What the loop asks besides.

    def open_plan(self) -> PlanRecord | None:
        """The cohort's oldest plan without a verdict."""
        with self._journal.read() as state:
            return next(iter(state.open_plans(self._cohort)), None)

    def wait_for_node(self, candidate: str) -> bool:
        """Wait until the cohort has a node that is not revoked; False when stopped, or when the candidate was decided meanwhile."""

        def found(state: State) -> tuple[bool] | None:
            if state.releases[candidate].state != "candidate":
                return (False,)
            return (True,) if state.members(self._cohort) else None

        return self._wait(found, None) == (True,)

    @property
    def stopped(self) -> bool:
        """Central stops: what was pulled may not be all there is."""
        return self._stop.is_set()

    def now(self) -> str:
        """The present time, RFC 3339 UTC."""
        return self._clock()

    # Train.

    def _offer_training(self, max_rank: int) -> str:
        with self._journal.read() as state:
            standing = state.train_offers.get(self._cohort)
            if standing is not None and standing.max_rank == max_rank:
                return standing.offer_id
            offer_id = uuid.uuid4().hex
            body = {"max_rank": max_rank}
            self._journal.append(NewEvent(EventKind.TRAIN_OFFERED, self._cohort, offer_id, body))
            return offer_id

    def _pull_updates(self, timeout_s: float | None) -> list[Message]:
        ready = self._wait(self._resume_or_plan, timeout_s)
        while isinstance(ready, _Draft):
            self._screen_and_record(ready.plan)
            ready = self._wait(self._resume_or_plan, timeout_s)
        planned = ready.planned if ready else None
        if planned is None or planned.candidate is not None:
            return []
        with self._journal.read() as state:
            return train_replies(state, planned)

    def _resume_or_plan(self, state: State) -> _Ready | None:
        # Runs under the journal's lock: nothing can change between the decision to merge and its record.
        under_way = next(iter(state.open_plans(self._cohort)), None)
        if under_way is not None:
            return _Ready(under_way)
        self._soak.look(state)
        plan = plan_merge(state, self._cohort, self._policy, self._clock())
        if plan is None:
            return None
        # Parts of a rejected plan were filtered as a whole.
        if self._screen is not None and plan.updates and not state.suspects(self._cohort):
            return _Draft(None, plan)
        return _Ready(self._record_plan(state, plan))

    def _screen_and_record(self, draft: MergePlan) -> None:
        """Record the filtered plan, or set aside an update that cannot be read; neither when the state has moved on meanwhile."""
        assert self._screen is not None
        with self._journal.read() as state:
            parent = state.releases[draft.parent].manifest.own_payload.digest_sha256
        try:
            plan, unusable = self._screen(draft, parent), None
        except UnusableUpdate as error:
            plan, unusable = draft, error
        with self._journal.read() as state:
            if not still_stands(state, draft):
                return
            if unusable is None:
                self._record_plan(state, plan)
                return
            self._journal.append(set_aside(self._cohort, unusable))
        log.error(
            "update set aside",
            extra={"cohort": self._cohort, "update_id": unusable.update_id, "reason": str(unusable)},
        )

    def _record_plan(self, state: State, plan: MergePlan) -> PlanRecord:
        """In one transaction: what a filter left out is set aside, the rest is planned."""
        body = {"plan": plan.to_bytes().decode()}
        self._journal.append(
            *(
                NewEvent(EventKind.UPDATE_SET_ASIDE, self._cohort, left_out.update_id, {"reason": left_out.reason})
                for left_out in plan.left_out
            ),
            NewEvent(EventKind.MERGE_PLANNED, self._cohort, plan.digest, body),
        )
        log.info(
            "merge planned",
            extra={
                "cohort": self._cohort,
                "plan": plan.digest,
                "updates": len(plan.updates),
                "left_out": len(plan.left_out),
            },
        )
        return state.plans[plan.digest]

    # Evaluate.

    def _offer_evaluation(self, messages: list[Message]) -> str:
        ask = Ask.from_json(str(messages[0].content[CONFIG]["look"]))
        asked = {message.metadata.dst_node_id for message in messages}
        with self._journal.read() as state:
            earlier = offers_of(state, ask.candidate, ask.look)
            # Only the first look has a quorum to meet: what a later one lacks, the verdict does without.
            over = (
                bool(earlier)
                and ask.look == 1
                and self._patience.expired(earlier[-1])
                and not self._enough(state, earlier)
            )
            missed = bool(earlier) and self._ended_unheard(state, earlier)
            if earlier and not over and not missed:
                return earlier[-1].offer_id
            if earlier:
                log.warning(
                    f"{'central was away' if missed else 'quorum not met'}, evaluation offered again",
                    extra={"cohort": self._cohort, "candidate": ask.candidate, "offers": len(earlier)},
                )
            answered = {node for node, report in reports_of_look(state, earlier).items() if is_result(report)}
            deadline = parse_time(self._clock()) + timedelta(seconds=self._patience.deadline_s(ask.tasks))
            body = {
                **ask.to_body(),
                "deadline_at": deadline.isoformat(timespec="microseconds").replace("+00:00", "Z"),
                "nodes": [
                    node
                    for node in state.members(self._cohort)
                    if flower_id(node) in asked and node not in answered and (ask.nodes is None or node in ask.nodes)
                ],
            }
            offer_id = uuid.uuid4().hex
            self._journal.append(NewEvent(EventKind.EVALUATION_OFFERED, self._cohort, offer_id, body))
            return offer_id

    def _pull_reports(self, offer_id: str, timeout_s: float | None) -> list[Message]:
        with self._journal.read() as state:
            offer = state.evaluations[offer_id]

        def complete(state: State) -> bool:
            offers = offers_of(state, offer.candidate, offer.look)
            missing = self._missing(state, offers)
            everybody = not any(self._patience.waits_for(state, node, state.evaluations[offer_id]) for node in missing)
            enough = offer.look > 1 or self._enough(state, offers)
            return self._patience.expired(offer) or (everybody and enough) or _closed(state, offer)

        if self._wait(complete, timeout_s) is None:
            return []
        with self._journal.read() as state:
            self._record_silent(state, state.evaluations[offer_id])
            reports = reports_of_look(state, offers_of(state, offer.candidate, offer.look))
            version = state.releases[offer.candidate].manifest.version
        return [self._reply(report, version) for report in reports.values()]

    def _missing(self, state: State, offers: list[EvaluationRecord]) -> set[str]:
        """Nodes of the look's last offer that are not revoked and have not reported."""
        return set(offers[-1].nodes).intersection(state.members(self._cohort)) - set(reports_of_look(state, offers))

    def _record_silent(self, state: State, offer: EvaluationRecord) -> None:
        """Take note of who held up the look without a result: next time nobody waits for it."""
        asked = [node for node in state.members(self._cohort) if node in offer.nodes]
        for node in [node for node in asked if self._patience.held_up(state, node, offer)]:
            self._journal.append(NewEvent(EventKind.NODE_SILENT, self._cohort, node, {"offer_id": offer.offer_id}))
            log.warning("evaluation held up without a result", extra={"cohort": self._cohort, "node_id": node})

    def _ended_unheard(self, state: State, offers: list[EvaluationRecord]) -> bool:
        """The look ended while central was away, so that nodes could not report."""
        return parse_time(offers[-1].deadline_at) <= self._patience.started and bool(self._missing(state, offers))

    def _reply(self, report: EvaluationReport, version: int) -> Message:
        asked = request(MessageType.EVALUATE, report.node_id, version)
        if not is_result(report):
            return Message(Error(ABSTAINED, report.abstain_reason or "no results"), reply_to=asked)
        fields = {"node_id": report.node_id, "results": canonical_json([dict(result) for result in report.results])}
        return Message(RecordDict({REPORT: ConfigRecord(fields)}), reply_to=asked)

    def _enough(self, state: State, offers: list[EvaluationRecord]) -> bool:
        return sum(map(is_result, reports_of_look(state, offers).values())) >= self._gate.quorum

    # Both.

    def _pull(self, message_ids: Iterable[str], timeout_s: float | None) -> list[Message]:
        replies: list[Message] = []
        for message_id in message_ids:
            with self._journal.read() as state:
                offer = state.evaluations.get(message_id)
                standing = state.train_offers.get(self._cohort)
            if offer is not None and offer.cohort == self._cohort:
                replies += self._pull_reports(message_id, timeout_s)
            elif standing is not None and standing.offer_id == message_id:
                replies += self._pull_updates(timeout_s)
            else:
                raise FederationError(f"Offer {message_id!r} is not one of cohort {self._cohort!r}; push it first.")
        return replies

    def _wait(self, predicate: Callable[[State], T | None], timeout_s: float | None) -> T | None:
        """`predicate`'s value once it has one; None when stopped or after `timeout_s` seconds."""
        until = None if timeout_s is None else parse_time(self._clock()) + timedelta(seconds=timeout_s)
        while not self._stop.is_set() and not _passed(until, self._clock):
            # The predicate runs after every append and after each slice: deadlines and ages need no polling of the disk.
            value = self._journal.wait(predicate, STOP_CHECK_S)
            if value is not None:
                return value
            self._went_on()
        return None


def set_aside(cohort: str, error: UnusableUpdate) -> NewEvent:
    """The event for an update that cannot be merged; it says whether the payload's bytes may come again."""
    body: dict[str, Any] = {"reason": str(error)}
    if isinstance(error, LostUpdate):
        body["lost"] = True
    return NewEvent(EventKind.UPDATE_SET_ASIDE, cohort, error.update_id, body)


def _closed(state: State, offer: EvaluationRecord) -> bool:
    """The candidate was decided elsewhere, for example by a rollback of its parent."""
    return state.releases[offer.candidate].state != "candidate"


def _passed(until: datetime | None, clock: Callable[[], str]) -> bool:
    return until is not None and parse_time(clock()) >= until
