"""Our Flower strategy: the weighted mean of the increments' products, added to the parent release.

In: replies that name updates by digest, with weights derived centrally. Out: the next release's factors (float32 arrays
`<module>/A` [rank, in_features] and `<module>/B` [out_features, rank], scale 1.0) and the merge's truncation error.
Guarantee: blobs are streamed one update at a time, so memory does not grow with their number; the result depends on the
replies alone, so a plan that is replayed gives the same bytes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from central.evaluation import pool
from central.federation.blame import find_cause
from central.federation.errors import FederationError, LostUpdate, StrategyFailed, UnusableUpdate
from central.merging import Merged, ProductSum
from central.merging.bounds import excess_of
from central.merging.errors import MergeError
from central.registry import BlobLost
from protos.lora import LoraCodecError, LoraModule, LoraTensors, decode

log = logging.getLogger(__name__)

COHORT = 0
"""Node id of "every node of the cohort, now and later": a train offer stands, it is not sent to single nodes."""
UPDATE, MERGE, REPORT, CONFIG = "update", "merge", "report", "config"
"""Names of the records in a message's content."""


class Blobs(Protocol):
    """Where payloads are read."""

    def read(self, digest: str) -> bytes:
        """The bytes with this SHA-256."""


@dataclass(frozen=True)
class MergeTerms:
    """What a plan says of one merge, as its replies carry it."""

    plan_id: str
    parent_payload: str
    rank: int
    server_step: float
    seed: int
    exact_rank: int
    server_state: str = ""
    """Blob with what the strategy goes on from (server_state.py); empty: nothing."""

    def to_record(self) -> ConfigRecord:
        return ConfigRecord(dict(vars(self)))


class ProductMean(Strategy):  # type: ignore[misc]
    """`P(v+1) = trunc_R(P(v) + eta * sum_i w_i scale_i B_i A_i)`; see central/merging."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One standing offer to the cohort. Nodes get releases by digest from the registry, so `arrays` is not sent."""
        content = RecordDict({CONFIG: config})
        return [
            Message(content=content, dst_node_id=COHORT, message_type=MessageType.TRAIN, group_id=str(server_round))
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next release from the replies of one plan; (None, None) without replies.

        Raises UnusableUpdate for a payload that cannot be merged or makes the strategy fail, StrategyFailed when it fails and no
        single update causes it.
        """
        messages = list(replies)  # digests only: the payloads are read one by one below
        if not messages:
            return None, None
        merged = self._merge(terms_of(messages), messages)
        metrics = MetricRecord({"truncation-error": merged.truncation_error, "updates": len(messages)})
        return to_arrays(merged.tensors), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One offer to every node that the grid knows; candidate and reference are named in `config` by digest."""
        content = RecordDict({CONFIG: config})
        return [
            Message(content=content, dst_node_id=node, message_type=MessageType.EVALUATE, group_id=str(server_round))
            for node in grid.get_node_ids()
        ]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Pass rates `<environment>/candidate` and `/reference` over all reports; None without any."""
        metrics = MetricRecord()
        for counts in pool(reports_of(replies)):
            metrics[f"{counts.environment}/candidate"] = counts.candidate_passed / counts.total
            metrics[f"{counts.environment}/reference"] = counts.reference_passed / counts.total
        return metrics or None

    def server_state(self) -> bytes | None:
        """What the last merge leaves for the next one; None: the next one needs nothing."""
        return None

    def summary(self) -> None:
        """Log what this strategy is."""
        log.info("merging in product space", extra={"strategy": type(self).__name__})

    def _merge(self, terms: MergeTerms, messages: Sequence[Message]) -> Merged:
        try:
            return self._sum(terms, messages)
        except StrategyFailed as error:
            cause = find_cause(len(messages), lambda kept: self._sum_fails(terms, [messages[i] for i in kept]))
            if cause is None:
                raise
            raise UnusableUpdate(str(messages[cause].content[UPDATE]["update_id"]), str(error)) from error

    def _sum_fails(self, terms: MergeTerms, messages: Sequence[Message]) -> bool:
        try:
            self._sum(terms, messages)
        except StrategyFailed:
            return True
        return False

    def _sum(self, terms: MergeTerms, messages: Sequence[Message]) -> Merged:
        total = self._parent(terms)
        for update_id, tensors, weight in self._increments(messages):
            try:
                total.add(tensors, terms.server_step * weight)
            except MergeError as error:
                raise UnusableUpdate(update_id, str(error)) from error
        return finished(total, f"The sum of {len(messages)} update(s)")

    def _parent(self, terms: MergeTerms) -> ProductSum:
        total = ProductSum(rank=terms.rank, seed=terms.seed, exact_rank=terms.exact_rank)
        total.add(decode(self._blobs.read(terms.parent_payload)), 1.0)
        return total

    def _increments(self, messages: Sequence[Message]) -> Iterator[tuple[str, LoraTensors, float]]:
        """(update id, increment, weight) one at a time, in the order of the plan; a clip's factor is in the increment."""
        for message in messages:
            update = message.content[UPDATE]
            update_id = str(update["update_id"])
            try:
                tensors = read_increment(self._blobs, update_id, str(update["payload"]))
            except BlobLost as error:
                self._blobs.read(terms_of([message]).parent_payload)  # lost too: then it is the store that is away
                raise LostUpdate(update_id, str(error)) from error
            yield update_id, scaled(tensors, float(update["factor"])), float(update["weight"])


def read_increment(blobs: Blobs, update_id: str, payload: str) -> LoraTensors:
    """An update's payload; raises UnusableUpdate for one that no strategy may see, BlobLost and StorageError as the store does."""
    try:
        tensors = decode(blobs.read(payload))
    except LoraCodecError as error:
        raise UnusableUpdate(update_id, str(error)) from error
    if text := excess_of(tensors):
        raise UnusableUpdate(update_id, text)
    return tensors


def finished(total: ProductSum, what: str) -> Merged:
    """The sum's result; raises StrategyFailed when it is none that a release can hold."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            merged = total.result()
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        raise StrategyFailed(f"{what} cannot be computed: {error}.") from error
    modules = merged.tensors.modules.values()
    if not math.isfinite(merged.truncation_error) or not all(
        np.isfinite(factor).all() for module in modules for factor in (module.A, module.B)
    ):
        raise StrategyFailed(f"{what} has values that are not finite.")
    return merged


def scaled(tensors: LoraTensors, factor: float) -> LoraTensors:
    """`factor` times the increment, with the same sections."""
    if factor == 1.0:
        return tensors
    modules = {name: replace(module, scale=factor * module.scale) for name, module in tensors.modules.items()}
    return LoraTensors(modules, tensors.sections)


def terms_of(messages: Sequence[Message]) -> MergeTerms:
    """The terms that all `messages` share; raises FederationError when they are of different plans."""
    terms = [MergeTerms(**message.content[MERGE]) for message in messages]
    if any(other != terms[0] for other in terms[1:]):
        raise FederationError("Replies of different merge plans were mixed; expected the replies of one plan.")
    return terms[0]


def reports_of(replies: Iterable[Message]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """(node id, results) of every reply that is not an abstention."""
    return [
        (str(reply.content[REPORT]["node_id"]), json.loads(reply.content[REPORT]["results"]))
        for reply in replies
        if not reply.has_error()
    ]


def to_arrays(tensors: LoraTensors) -> ArrayRecord:
    """Factors as Flower carries them; every scale must be 1.0."""
    record = ArrayRecord()
    for name, module in tensors.modules.items():
        record[f"{name}/A"], record[f"{name}/B"] = Array(module.A), Array(module.B)
    return record


def to_tensors(arrays: ArrayRecord) -> LoraTensors:
    """The inverse of `to_arrays`, as float32."""
    names = sorted(key.removesuffix("/A") for key in arrays if key.endswith("/A"))
    return LoraTensors(
        {name: LoraModule(_float32(arrays[f"{name}/A"]), _float32(arrays[f"{name}/B"])) for name in names}
    )


def _float32(array: Array) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ascontiguousarray(array.numpy(), dtype=np.float32)
