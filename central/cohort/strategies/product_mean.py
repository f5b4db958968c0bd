"""Our Flower strategy: the weighted mean of the increments' products, added to the parent release.

In: a merge plan, what it stands on, and replies that name the plan's updates by digest. Out: the
next release's factors (float32 arrays `<module>/A` [rank, in_features] and `<module>/B`
[out_features, rank], scale 1.0) and the merge's truncation error. Guarantee: one update is in
memory at a time, however many there are. The result depends on the plan and the blobs alone, so a
plan that is merged again gives the same bytes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from central.blobs import BlobLost
from central.cohort.errors import LostUpdate, StrategyFailed, UnusableUpdate
from central.journal import MergePlan
from central.merging import Merged, ProductSum
from central.merging.bounds import excess_of
from central.merging.errors import MergeError
from protos.lora import LoraCodecError, LoraModule, LoraTensors, decode

log = logging.getLogger(__name__)

COHORT = 0
"""Flower's number for the cohort as a whole, which is asked for the updates of a plan."""
CONFIG, UPDATE = "config", "update"
"""Names of the records in a message's content."""


class Blobs(Protocol):
    """Where payloads are read."""

    def read(self, digest: str) -> bytes:
        """The bytes with this SHA-256."""


@dataclass(frozen=True)
class Start:
    """What a merge adds to, as digests of blobs."""

    parent: str
    """The parent's own product."""
    server_state: str = ""
    """What the strategy left at the merge before (moments.py); empty when it begins afresh."""


class ProductMean(Strategy):  # type: ignore[misc]
    """`P(v+1) = trunc_R(P(v) + eta * sum_i w_i scale_i B_i A_i)`; see central/merging."""

    def __init__(self, plan: MergePlan, start: Start, blobs: Blobs) -> None:
        self._plan = plan
        self._start = start
        self._blobs = blobs

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message, which asks the cohort for the updates of the plan that `config` names.

        Nodes get releases from the registry, so `arrays` is not sent.
        """
        content = RecordDict({CONFIG: config})
        group = str(server_round)
        return [Message(content, COHORT, MessageType.TRAIN, group_id=group)]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next release from the plan's updates; (None, None) without replies.

        Raises UnusableUpdate for an update that cannot be merged or makes the strategy fail,
        StrategyFailed when it fails and no single update causes it.
        """
        messages = list(replies)  # digests only: the payloads are read one by one below
        if not messages:
            return None, None
        merged = self._merge(messages)
        metrics = MetricRecord(
            {"truncation-error": merged.truncation_error, "updates": len(messages)}
        )
        return to_arrays(merged.tensors), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: nodes judge a candidate by offers in the journal (judging.py)."""
        return ()

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Nothing: the gate decides on reports in the journal (judging.py)."""
        return None

    def server_state(self) -> bytes | None:
        """What this merge leaves for the next one; None: the next one needs nothing."""
        return None

    def summary(self) -> None:
        """Log what this strategy is."""
        log.info("merging in product space", extra={"strategy": type(self).__name__})

    def _merge(self, messages: Sequence[Message]) -> Merged:
        try:
            return self._sum(messages)
        except StrategyFailed as error:
            cause = find_cause(
                len(messages),
                lambda kept: strategy_fails(lambda: self._sum([messages[i] for i in kept])),
            )
            if cause is None:
                raise
            update_id = str(messages[cause].content[UPDATE]["update_id"])
            raise UnusableUpdate(update_id, str(error)) from error

    def _sum(self, messages: Sequence[Message]) -> Merged:
        total, what = self._parent(), f"The sum of {len(messages)} update(s)"
        for update_id, tensors, weight in self._increments(messages):
            try:
                add_term(total, tensors, self._plan.server_step * weight, what)
            except MergeError as error:
                raise UnusableUpdate(update_id, str(error)) from error
        return finished(total, what)

    def _parent(self) -> ProductSum:
        plan = self._plan
        total = ProductSum(rank=plan.rank, seed=plan.seed, exact_rank=plan.exact_rank)
        total.add(decode(self._blobs.read(self._start.parent)), 1.0)
        return total

    def _increments(self, messages: Sequence[Message]) -> Iterator[tuple[str, LoraTensors, float]]:
        """(update id, increment with its clip's factor, weight), in the plan's order."""
        for message in messages:
            update = message.content[UPDATE]
            update_id = str(update["update_id"])
            try:
                tensors = read_increment(self._blobs, update_id, str(update["payload"]))
            except BlobLost as error:
                self._blobs.read(self._start.parent)  # lost too: then the store is away
                raise LostUpdate(update_id, str(error)) from error
            yield update_id, scaled(tensors, float(update["factor"])), float(update["weight"])


def find_cause(count: int, fails: Callable[[Sequence[int]], bool]) -> int | None:
    """Index of the one update of `count` that makes a merge fail; None if no single one does.

    `fails(kept)` says whether the merge also fails with those at the indices `kept` alone. A
    failure with no update at all is the strategy's or the parent's. Otherwise halves are tried,
    then halves of the half that fails alone: at most 2 log2(n) + 1 tries, always the same ones.
    Where neither half fails alone, the updates fail only together.
    """
    if fails(()):
        return None
    suspects: Sequence[int] = range(count)
    while len(suspects) > 1:
        middle = len(suspects) // 2
        half = next((half for half in (suspects[:middle], suspects[middle:]) if fails(half)), None)
        if half is None:
            return None
        suspects = half
    return suspects[0] if suspects else None


def strategy_fails(merge: Callable[[], object]) -> bool:
    """Whether the merge raises StrategyFailed."""
    try:
        merge()
    except StrategyFailed:
        return True
    return False


def read_increment(blobs: Blobs, update_id: str, payload: str) -> LoraTensors:
    """An update's payload.

    Raises UnusableUpdate for one that no strategy may see, BlobLost and StorageError as the store
    does.
    """
    try:
        tensors = decode(blobs.read(payload))
    except LoraCodecError as error:
        raise UnusableUpdate(update_id, str(error)) from error
    if text := excess_of(tensors):
        raise UnusableUpdate(update_id, text)
    return tensors


def add_term(total: ProductSum, tensors: LoraTensors, weight: float, what: str) -> None:
    """Add to the sum that `what` names.

    Raises MergeError for a module that does not fit, StrategyFailed when the terms so far cannot be
    computed with.
    """
    try:
        total.add(tensors, weight)
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        raise StrategyFailed(f"{what} cannot be computed: {error}.") from error


def finished(total: ProductSum, what: str) -> Merged:
    """The sum's result; raises StrategyFailed when it is none that a release can hold."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            merged = total.result()
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        raise StrategyFailed(f"{what} cannot be computed: {error}.") from error
    if not math.isfinite(merged.truncation_error) or not all_finite(merged.tensors):
        raise StrategyFailed(f"{what} has values that are not finite.")
    return merged


def all_finite(tensors: LoraTensors) -> bool:
    """Whether every factor has finite values only."""
    return all(
        np.isfinite(factor).all()
        for module in tensors.modules.values()
        for factor in (module.A, module.B)
    )


def scaled(tensors: LoraTensors, factor: float) -> LoraTensors:
    """`factor` times the increment, with the same sections."""
    if factor == 1.0:
        return tensors
    modules = {
        name: replace(module, scale=factor * module.scale)
        for name, module in tensors.modules.items()
    }
    return LoraTensors(modules, tensors.sections)


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
        {
            name: LoraModule(_float32(arrays[f"{name}/A"]), _float32(arrays[f"{name}/B"]))
            for name in names
        }
    )


def _float32(array: Array) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ascontiguousarray(array.numpy(), dtype=np.float32)
