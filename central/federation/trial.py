"""A trial of the configured strategy at start, so that a setting that cannot work fails then and not at the first merge.

In: name, options and the least number of updates of a merge policy. Out: nothing, or SettingsError with what to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from central.errors import SettingsError
from central.federation.errors import StrategyFailed
from central.federation.planning import PRODUCT_MEAN, least_updates
from central.federation.server_state import CARRIED, ServerState
from central.federation.stock import aggregate, construct
from protos.lora import LoraModule, LoraTensors


def check_strategy(name: str, options: Mapping[str, Any], min_updates: int) -> None:
    """Try the strategy on small arrays, two merges one after the other.

    Raises SettingsError when it cannot be made, needs more than `min_updates`, fails, or keeps arrays that no release would carry.
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
            f"{options.get('num_malicious_nodes', 0)} needs at least {least} updates. Set it to {least} or more."
        )
    for count in sorted({least, min_updates}):
        state = ServerState()
        for _ in range(2):
            state = _merge(name, options, count, state)


def _merge(name: str, options: Mapping[str, Any], count: int, before: ServerState) -> ServerState:
    stock = construct(name, options)
    increments = [(f"{number}", _example(number), 1 / count) for number in range(count)]
    try:
        _, after = aggregate(stock, increments, before)
    except StrategyFailed as error:
        raise SettingsError(
            f"CENTRAL_MERGE__STRATEGY: {error} Use {PRODUCT_MEAN}, or other values in CENTRAL_MERGE__STRATEGY_OPTIONS."
        ) from error
    # current_arrays: what the nodes start from, which is zero in every merge.
    carried = {"current_arrays", *CARRIED.get(name, ())}
    kept = sorted(key for key, value in vars(stock).items() if key not in carried and _holds_arrays(value))
    if kept:
        raise SettingsError(
            f"CENTRAL_MERGE__STRATEGY: {name} keeps {', '.join(kept)} between merges, which this version of central does not save "
            f"with a release. Use {PRODUCT_MEAN}."
        )
    return after or ServerState()


def _example(seed: int) -> LoraTensors:
    rng = np.random.default_rng(seed)
    return LoraTensors(
        {"m": LoraModule(rng.standard_normal((2, 3), np.float32), rng.standard_normal((4, 2), np.float32))}
    )


def _holds_arrays(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(item, np.ndarray) for item in values) or isinstance(value, ArrayRecord)
