"""Any stock strategy of flwr.serverapp.strategy, by name, between our increments and our releases.

In: replies that name updates by digest, all from one start. Out: the next release. The stock strategy sees what it expects:
float32 arrays of equal shape, namely every increment's A and scale * B, padded with zeros to the largest rank and to the
modules of all updates (padding changes no product), weighted by central's weights under the key it calls the number of
examples, with zero arrays as the current model (a fresh increment is zero). What it returns is taken as one increment
and added to the parent in product space.

Limits: it holds all replies in memory; averaging A and B separately is not the mean of the products (central/merging);
strategies that keep arrays between rounds (FedAdam's moments) are refused, because that state is not yet saved with a release.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import strategy as stock_strategies
from flwr.serverapp.strategy import Strategy

from central.errors import SettingsError
from central.federation.errors import FederationError, UnusableUpdate
from central.federation.planning import PRODUCT_MEAN
from central.federation.strategy import Blobs, MergeTerms, ProductMean, to_arrays, to_tensors
from central.merging import Merged
from central.merging.errors import MergeError
from protos.lora import Array, LoraModule, LoraTensors

LEAST_NODES = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
"""With the default of two, a cohort of one waits for ever."""

# Flower prints a page per round to its own handler; our loop logs the same facts once.
logging.getLogger("flwr").setLevel(logging.WARNING)


def make_strategy(name: str, options: Mapping[str, Any], blobs: Blobs) -> ProductMean:
    """The strategy of a policy or plan; raises SettingsError for an unknown name or option."""
    return ProductMean(blobs) if name == PRODUCT_MEAN else StockMean(name, options, blobs)


def check_strategy(name: str, options: Mapping[str, Any], min_updates: int) -> None:
    """Try the strategy on small arrays, so that a setting that cannot work fails at start and not at the first merge.

    Raises SettingsError when it cannot be made, fails on one reply or on `min_updates`, or keeps server state.
    """
    if name == PRODUCT_MEAN:
        return
    for count in sorted({1, min_updates}):
        stock = _construct(name, options)
        increments = [(f"{i}", _example(i), 1 / count) for i in range(count)]
        try:
            aggregated = _aggregate(stock, _weight_key(options), 1, increments)
        except (
            Exception
        ) as error:  # a trial of foreign code with the operator's options: any failure is a wrong setting
            raise SettingsError(
                f"CENTRAL_MERGE__STRATEGY: {name} fails with {count} update(s): {error}. "
                f"Use {PRODUCT_MEAN}, or a strategy that aggregates that many replies with these options."
            ) from error
        if aggregated is None:
            raise SettingsError(f"CENTRAL_MERGE__STRATEGY: {name} returns nothing for {count} update(s).")
        kept = sorted(key for key, value in vars(stock).items() if key != "current_arrays" and _holds_arrays(value))
        if kept:
            raise SettingsError(
                f"CENTRAL_MERGE__STRATEGY: {name} keeps server state ({', '.join(kept)}), which releases do not carry yet. "
                f"Use {PRODUCT_MEAN} or one without state, for example FedAvg, FedMedian or FedTrimmedAvg."
            )


class StockMean(ProductMean):
    """A stock strategy's average of the factors, added to the parent in product space."""

    def __init__(self, name: str, options: Mapping[str, Any], blobs: Blobs) -> None:
        super().__init__(blobs)
        self._stock = _construct(name, options)
        self._weight_key = _weight_key(options)

    def _merge(self, terms: MergeTerms, messages: Sequence[Message]) -> Merged:
        total = self._parent(terms)
        increments = list(self._increments(messages))
        averaged = _aggregate(self._stock, self._weight_key, 1, increments)
        if averaged is None:
            raise FederationError(f"{type(self._stock).__name__} made nothing of {len(increments)} updates.")
        try:
            total.add(averaged, terms.server_step)
        except MergeError as error:
            raise UnusableUpdate(increments[0][0], str(error)) from error
        return total.result()


@dataclass(frozen=True)
class _Repliers:
    """The one thing a stock `configure_train` asks of a grid: who is there."""

    count: int

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.count + 1)


def _construct(name: str, options: Mapping[str, Any]) -> Strategy:
    if name not in _averaging_strategies():
        raise SettingsError(
            f"CENTRAL_MERGE__STRATEGY: unknown strategy {name!r}; expected {PRODUCT_MEAN} or one of "
            f"{', '.join(_averaging_strategies())}."
        )
    kind = getattr(stock_strategies, name)
    own = sorted(LEAST_NODES.keys() & options.keys())
    if own:
        raise SettingsError(
            f"CENTRAL_MERGE__STRATEGY_OPTIONS: {', '.join(own)} cannot be set: when to merge is said by "
            "CENTRAL_MERGE__MIN_UPDATES and CENTRAL_MERGE__MAX_AGE_S."
        )
    accepted = inspect.signature(kind).parameters
    defaults = {key: value for key, value in LEAST_NODES.items() if key in accepted}
    try:
        return kind(**{**defaults, **options})
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"CENTRAL_MERGE__STRATEGY_OPTIONS: {name} cannot be made from {dict(options)}: {error}."
        ) from error


def _averaging_strategies() -> list[str]:
    """Names of the stock strategies that average arrays; the others boost trees or wrap another strategy."""
    return sorted(
        name
        for name in stock_strategies.__all__
        if inspect.isclass(kind := getattr(stock_strategies, name))
        and issubclass(kind, stock_strategies.FedAvg)
        and not name.startswith("FedXgb")
    )


def _weight_key(options: Mapping[str, Any]) -> str:
    return str(options.get("weighted_by_key", "num-examples"))


def _aggregate(
    stock: Strategy, weight_key: str, server_round: int, increments: Sequence[tuple[str, LoraTensors, float]]
) -> LoraTensors | None:
    """The stock strategy's increment (scale 1.0) from (update id, increment, weight)."""
    shapes = _common_shapes(increments)
    padded = [to_arrays(_pad(tensors, shapes)) for _, tensors, _ in increments]
    zero = to_arrays(
        LoraTensors(
            {name: LoraModule(np.zeros(a, np.float32), np.zeros(b, np.float32)) for name, (a, b) in shapes.items()}
        )
    )
    # Tells strategies that need it the current model; the offer to the nodes already stands, so the messages are dropped.
    list(stock.configure_train(server_round, zero, ConfigRecord(), _Repliers(len(increments))))
    replies = []
    for node, (arrays, (_, _, weight)) in enumerate(zip(padded, increments, strict=True), start=1):
        request = Message(content=RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN)
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({weight_key: weight})})
        replies.append(Message(content, reply_to=request))
    aggregated: ArrayRecord | None = stock.aggregate_train(server_round, replies)[0]
    return None if aggregated is None else to_tensors(aggregated)


def _common_shapes(
    increments: Sequence[tuple[str, LoraTensors, float]],
) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Shapes of A and B per module at the largest rank; raises UnusableUpdate for other features than the first's."""
    features: dict[str, tuple[int, int]] = {}
    ranks: dict[str, int] = {}
    for update_id, tensors, _ in increments:
        for name in sorted(tensors.modules):
            module = tensors.modules[name]
            own = (module.B.shape[0], module.A.shape[1])
            if features.setdefault(name, own) != own:
                raise UnusableUpdate(update_id, f"module {name!r} has features {own}; expected {features[name]}.")
            ranks[name] = max(ranks.get(name, 0), module.rank)
    return {name: ((ranks[name], inn), (out, ranks[name])) for name, (out, inn) in sorted(features.items())}


def _pad(tensors: LoraTensors, shapes: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]) -> LoraTensors:
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


def _example(seed: int) -> LoraTensors:
    rng = np.random.default_rng(seed)
    return LoraTensors(
        {"m": LoraModule(rng.standard_normal((2, 3), np.float32), rng.standard_normal((4, 2), np.float32))}
    )


def _holds_arrays(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(item, np.ndarray) for item in values) or isinstance(value, ArrayRecord)
