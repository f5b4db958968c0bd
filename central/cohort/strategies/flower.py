"""Any averaging strategy of flwr.serverapp.strategy, by name, on our increments.

In: a merge plan of updates from one start, and the replies that name them by digest. Out: the next
release, and the strategy's server state (moments.py).

A stock strategy gets what it expects: float32 arrays of equal shape, with zero arrays as the
current model, because a fresh increment is zero. The arrays are every increment's A and scale * B,
padded with zeros to the largest rank and to all modules; padding changes no product. Central's
weight stands under the key that the strategy calls the number of examples. What the strategy
returns is one increment, which is added to the parent in product space.

Limits: it holds all increments in memory; the average of A and of B is not the mean of the
products.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import strategy as stock_strategies
from flwr.serverapp.strategy import FedAvg

from central.cohort.errors import StrategyFailed, UnusableUpdate
from central.cohort.planning import PRODUCT_MEAN, least_updates
from central.cohort.strategies.moments import (
    CARRIED,
    ServerState,
    Shapes,
    put_state,
    take_state,
)
from central.cohort.strategies.product_mean import (
    Blobs,
    ProductMean,
    Start,
    add_term,
    all_finite,
    find_cause,
    finished,
    strategy_fails,
    to_arrays,
    to_tensors,
)
from central.errors import SettingsError
from central.journal import MergePlan
from central.merging import Merged
from central.merging.errors import MergeError
from protos.lora import LoraModule, LoraTensors
from protos.rounding import Array

log = logging.getLogger(__name__)

Increment = tuple[str, LoraTensors, float]
"""Update id, increment, weight."""
LEAST_NODES = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
"""With the default of two, a cohort of one waits for ever."""
_TREES = "it aggregates trees, not arrays"
_PRIVACY = (
    "it wraps another strategy, which a name and parameters do not give, and its noise comes from "
    "no seed, so that a candidate "
    "could not be made again after a crash"
)
UNUSABLE: Mapping[str, str] = {
    "DifferentialPrivacyClientSideAdaptiveClipping": _PRIVACY,
    "DifferentialPrivacyClientSideFixedClipping": _PRIVACY,
    "DifferentialPrivacyServerSideAdaptiveClipping": _PRIVACY,
    "DifferentialPrivacyServerSideFixedClipping": _PRIVACY,
    "FedXgbBagging": _TREES,
    "FedXgbCyclic": _TREES,
    "QFedAvg": "it weights updates by the loss that nodes claim, and central takes no weight from "
    "a node's word",
}
"""The strategies of flwr that cannot merge updates here, and why."""

# Flower prints a page per round to its own handler; our loop logs the same facts once.
logging.getLogger("flwr").setLevel(logging.WARNING)


def make_strategy(plan: MergePlan, start: Start, blobs: Blobs) -> ProductMean:
    """The strategy that merges the plan; raises SettingsError for an unknown name or option."""
    made = ProductMean if plan.strategy == PRODUCT_MEAN else StockMean
    return made(plan, start, blobs)


def usable_strategies() -> list[str]:
    """Names of the strategies in flwr.serverapp.strategy that can merge updates."""
    return sorted(
        name
        for name in stock_strategies.__all__
        if inspect.isclass(kind := getattr(stock_strategies, name))
        and issubclass(kind, FedAvg)
        and name not in UNUSABLE
    )


class StockMean(ProductMean):
    """A stock strategy's average of the factors, added to the parent in product space."""

    def __init__(self, plan: MergePlan, start: Start, blobs: Blobs) -> None:
        super().__init__(plan, start, blobs)
        self._stock = construct(plan.strategy, plan.strategy_options)
        self._state: ServerState | None = None

    def server_state(self) -> bytes | None:
        """What this merge leaves for the next one."""
        return None if self._state is None else self._state.to_bytes()

    def _merge(self, messages: Sequence[Message]) -> Merged:
        name = self._plan.strategy
        total = self._parent()
        increments = list(self._increments(messages))
        before = self._state_before()
        try:
            averaged, self._state = aggregate(self._stock, increments, before)
        except StrategyFailed as error:
            cause = find_cause(len(increments), lambda kept: self._fails(increments, kept, before))
            if cause is None:
                raise
            raise UnusableUpdate(increments[cause][0], str(error)) from error
        what = f"What {name} made of {len(increments)} update(s)"
        try:
            add_term(total, averaged, self._plan.server_step, what)
        except MergeError as error:  # the parent has other features: all increments agree
            raise StrategyFailed(
                f"{name} made what does not fit the parent release: {error}"
            ) from error
        return finished(total, what)

    def _fails(
        self, increments: Sequence[Increment], kept: Collection[int], before: ServerState
    ) -> bool:
        """Whether a merge fails with zeros in place of all but the `kept` increments.

        Their number stays the same, because some strategies need it.
        """
        tried = [
            increment if index in kept else (increment[0], _zeros(increment[1]), increment[2])
            for index, increment in enumerate(increments)
        ]
        stock = construct(self._plan.strategy, self._plan.strategy_options)
        return strategy_fails(lambda: aggregate(stock, tried, before))

    def _state_before(self) -> ServerState:
        if self._start.server_state:
            return ServerState.from_bytes(self._blobs.read(self._start.server_state))
        if self._plan.strategy in CARRIED:
            fields = {"strategy": self._plan.strategy, "plan": self._plan.digest}
            log.info("server state starts afresh", extra=fields)
        return ServerState()


def aggregate(
    stock: FedAvg, increments: Sequence[Increment], before: ServerState
) -> tuple[LoraTensors, ServerState | None]:
    """What a new stock strategy makes of the increments: one increment (scale 1.0), and its state.

    Raises UnusableUpdate for features that do not fit the others', StrategyFailed when the strategy
    makes nothing of them.
    """
    with np.errstate(all="ignore"):  # what overflows is found at the end
        return _aggregate(stock, increments, before)


def _aggregate(
    stock: FedAvg, increments: Sequence[Increment], before: ServerState
) -> tuple[LoraTensors, ServerState | None]:
    name = type(stock).__name__
    shapes = _common_shapes(increments, before)
    replies = _replies(increments, shapes, stock.weighted_by_key)
    zero = to_arrays(_pad(LoraTensors(), shapes))
    put_state(stock, before, shapes)
    try:
        # Some strategies note the current model here. Nobody is asked: the replies are there.
        list(
            stock.configure_train(before.merges + 1, zero, ConfigRecord(), _Repliers(len(replies)))
        )
        averaged: ArrayRecord | None = stock.aggregate_train(before.merges + 1, replies)[0]
    except Exception as error:  # foreign code with the operator's options may raise anything
        raise StrategyFailed(f"{name} failed on {len(replies)} update(s): {error}.") from error
    if averaged is None:
        raise StrategyFailed(f"{name} made nothing of {len(replies)} update(s).")
    tensors = to_tensors(averaged)
    if not all_finite(tensors):
        raise StrategyFailed(f"{name} made values that are not finite of {len(replies)} update(s).")
    return tensors, take_state(stock, before, shapes)


def construct(name: str, options: Mapping[str, Any]) -> FedAvg:
    """A new strategy of flwr; raises SettingsError for a name or options that cannot work."""
    if name not in usable_strategies():
        reason = (
            f"{name} cannot be used: {UNUSABLE[name]}"
            if name in UNUSABLE
            else f"unknown strategy {name!r}"
        )
        raise SettingsError(
            f"CENTRAL_MERGE__STRATEGY: {reason}. Expected {PRODUCT_MEAN} or one of "
            f"{', '.join(usable_strategies())}."
        )
    _check_options(name, options)
    kind = getattr(stock_strategies, name)
    accepted = inspect.signature(kind).parameters
    defaults = {key: value for key, value in LEAST_NODES.items() if key in accepted}
    try:
        return kind(**{**defaults, **options})
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"CENTRAL_MERGE__STRATEGY_OPTIONS: {name} cannot be made from {dict(options)}: {error}."
        ) from error


def check_strategy(name: str, options: Mapping[str, Any], min_updates: int) -> None:
    """Try the strategy on small arrays, two merges one after the other.

    Raises SettingsError when it cannot be made, needs more than `min_updates`, fails, or keeps
    arrays that no release would carry.
    """
    if name == PRODUCT_MEAN:
        return
    construct(name, options)
    try:
        least = least_updates(name, options)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"CENTRAL_MERGE__STRATEGY_OPTIONS: {name}: {error}.") from error
    if min_updates < least:
        raise SettingsError(
            f"CENTRAL_MERGE__MIN_UPDATES is {min_updates}; {name} with num_malicious_nodes "
            f"{options.get('num_malicious_nodes', 0)} needs at least {least} updates. Set it to "
            f"{least} or more."
        )
    for count in sorted({least, min_updates}):
        state = ServerState()
        for _ in range(2):
            state = _try_merge(name, options, count, state)


def _try_merge(
    name: str, options: Mapping[str, Any], count: int, before: ServerState
) -> ServerState:
    stock = construct(name, options)
    increments = [(f"{number}", _example(number), 1 / count) for number in range(count)]
    try:
        _, after = aggregate(stock, increments, before)
    except StrategyFailed as error:
        raise SettingsError(
            f"CENTRAL_MERGE__STRATEGY: {error} Use {PRODUCT_MEAN}, or other values in "
            "CENTRAL_MERGE__STRATEGY_OPTIONS."
        ) from error
    # current_arrays: what the nodes start from, which is zero in every merge.
    carried = {"current_arrays", *CARRIED.get(name, ())}
    kept = sorted(
        key for key, value in vars(stock).items() if key not in carried and _holds_arrays(value)
    )
    if kept:
        raise SettingsError(
            f"CENTRAL_MERGE__STRATEGY: {name} keeps {', '.join(kept)} between merges, which this "
            "version of central does not save "
            f"with a release. Use {PRODUCT_MEAN}."
        )
    return after or ServerState()


def _example(seed: int) -> LoraTensors:
    rng = np.random.default_rng(seed)
    return LoraTensors(
        {
            "m": LoraModule(
                rng.standard_normal((2, 3), np.float32), rng.standard_normal((4, 2), np.float32)
            )
        }
    )


def _holds_arrays(value: object) -> bool:
    values = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, (list, tuple))
        else [value]
    )
    return any(isinstance(item, np.ndarray) for item in values) or isinstance(value, ArrayRecord)


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse what flwr would take and what would then have no effect."""
    when = sorted({*LEAST_NODES, "fraction_train", "fraction_evaluate"} & options.keys())
    if when:
        raise SettingsError(
            f"CENTRAL_MERGE__STRATEGY_OPTIONS: {', '.join(when)} cannot be set: nodes are not "
            "sampled, and when to merge is "
            "said by CENTRAL_MERGE__MIN_UPDATES and CENTRAL_MERGE__MAX_AGE_S."
        )
    if name == "FedProx" and options.get("proximal_mu"):
        raise SettingsError(
            f"CENTRAL_MERGE__STRATEGY_OPTIONS: proximal_mu is {options['proximal_mu']!r}, but the "
            "proximal term is trained at the "
            "nodes, and their rounds have none. Leave it out; FedProx is then FedAvg."
        )


@dataclass(frozen=True)
class _Repliers:
    """The one thing a stock `configure_train` asks of a grid: who is there."""

    count: int

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.count + 1)


def _replies(increments: Sequence[Increment], shapes: Shapes, weight_key: str) -> list[Message]:
    replies = []
    for node, (_, tensors, weight) in enumerate(increments, start=1):
        request = Message(content=RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN)
        metrics = MetricRecord({weight_key: weight})
        content = RecordDict({"arrays": to_arrays(_pad(tensors, shapes)), "metrics": metrics})
        replies.append(Message(content, reply_to=request))
    return replies


def _common_shapes(increments: Sequence[Increment], before: ServerState) -> Shapes:
    """Shapes of A and B per module at the largest rank.

    Raises UnusableUpdate for other features than met before.
    """
    features = {name: (b[0], a[1]) for name, (a, b) in before.shapes.items()}
    ranks = {name: a[0] for name, (a, _) in before.shapes.items()}
    for update_id, tensors, _ in increments:
        for name in sorted(tensors.modules):
            module = tensors.modules[name]
            own = (module.B.shape[0], module.A.shape[1])
            if features.setdefault(name, own) != own:
                raise UnusableUpdate(
                    update_id, f"module {name!r} has features {own}; expected {features[name]}."
                )
            ranks[name] = max(ranks.get(name, 0), module.rank)
    return {
        name: ((ranks[name], inn), (out, ranks[name]))
        for name, (out, inn) in sorted(features.items())
    }


def _zeros(tensors: LoraTensors) -> LoraTensors:
    modules = {
        name: LoraModule(np.zeros_like(module.A), np.zeros_like(module.B))
        for name, module in tensors.modules.items()
    }
    return LoraTensors(modules)


def _pad(tensors: LoraTensors, shapes: Shapes) -> LoraTensors:
    """`tensors` with every module of `shapes`, scale folded into B."""
    modules = {}
    for name, (a_shape, b_shape) in shapes.items():
        A: Array = np.zeros(a_shape, np.float32)
        B: Array = np.zeros(b_shape, np.float32)
        if name in tensors.modules:
            module = tensors.modules[name]
            A[: module.rank] = module.A
            B[:, : module.rank] = module.B * np.float32(module.scale)
        modules[name] = LoraModule(A, B)
    return LoraTensors(modules)
