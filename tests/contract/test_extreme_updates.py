"""An update with an extreme that its product hides: refused at intake, else blamed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from central.cohort.errors import StrategyFailed
from central.cohort.planning import PRODUCT_MEAN
from central.cohort.strategies.flower import usable_strategies
from central.cohort.strategies.product_mean import find_cause
from central.merging.bounds import MAX_FACTOR_NORM, MAX_SCALE
from protos.lora import LoraModule, LoraTensors, decode, encode
from tests.contract import central_harness as harness
from tests.contract.cohort_loop import (
    NAMES,
    Central,
    make_increment,
    make_settings,
    opened,
    take_steps,
)

NODES = tuple(f"{letter}-{number}" for number, letter in enumerate("abcdefgh"))
OPTIONS: dict[str, dict[str, Any]] = {"MultiKrum": {"num_nodes_to_select": 2}}
RULES: list[dict[str, Any]] = [
    {"strategy": PRODUCT_MEAN},
    *({"strategy": PRODUCT_MEAN, "filter": name} for name in ("clip", "near", "multi-krum")),
    *(
        {"strategy": name, "strategy_options": OPTIONS.get(name, {})}
        for name in usable_strategies()
    ),
    *({"strategy": name, "filter": "near"} for name in ("FedAvg", "FedAdam")),
]


def changed(
    tensors: LoraTensors, a: float = 1.0, b: float = 1.0, scale: float | None = None
) -> LoraTensors:
    """The factors times `a` and `b`; and another scale."""
    return LoraTensors(
        {
            name: LoraModule(
                (module.A * np.float64(a)).astype(np.float32),
                (module.B * np.float64(b)).astype(np.float32),
                module.scale if scale is None else scale,
            )
            for name, module in tensors.modules.items()
        }
    )


REFUSED: dict[str, tuple[dict[str, float], str]] = {
    "scale 1e70 over factors of 1e-40": (
        {"a": 1e-40, "b": 1e-40, "scale": 1e70},
        "has scale 1e+70; expected at most 1",
    ),
    "scale -1e70": (
        {"a": 1e-40, "b": 1e-40, "scale": -1e70},
        "has scale -1e+70; expected at most 10000, of either",
    ),
    "scale 1e300": ({"a": 1e-45, "b": 1e-45, "scale": 1e300}, "has scale 1e+300"),
    "scale 1e39 over a small B": ({"b": 1e-39, "scale": 1e39}, "has scale 1e+39"),
    "scale 2e4 over small factors": ({"a": 1e-3, "b": 1e-3, "scale": 2e4}, "has scale 20000"),
    "A 1e30, B 1e-30": ({"a": 1e30, "b": 1e-30, "scale": 1.0}, "has factor A of Frobenius norm"),
    "B 1e30, A 1e-30": ({"a": 1e-30, "b": 1e30, "scale": 1.0}, "has factor B of Frobenius norm"),
    "A 1e30, scale 1e-30": ({"a": 1e30, "scale": 1e-30}, "has factor A of Frobenius norm"),
    "A and B 1e35, scale 1e-70": (
        {"a": 1e35, "b": 1e35, "scale": 1e-70},
        "has factor A of Frobenius norm",
    ),
    "A 1e5, B 1e-5": ({"a": 1e5, "b": 1e-5, "scale": 1.0}, "expected at most 10000"),
    "an increment of 1e6": ({"a": 1e3, "b": 1e3, "scale": 1.0}, "has an increment of norm"),
    "zero": ({"b": 0.0}, "Every module has an increment of norm 1e-12 or less"),
    "scale zero": ({"scale": 0.0}, "Every module has an increment of norm 1e-12 or less"),
    "denormal": ({"a": 1e-40, "b": 1e-40}, "Every module has an increment of norm 1e-12 or less"),
    "lost below float32": ({"a": 1e-15, "b": 1e-15}, "The round learnt nothing"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_an_extreme_is_refused_with_value_bound_and_next_step(
    tmp_path: Path, what: str
) -> None:
    factors, text = REFUSED[what]
    async with harness.running_central(harness.make_settings(tmp_path)) as central:
        node = await central.enroll("a", await central.token())
        payload = encode(changed(harness.make_factors(), **factors))
        status, reason, said = await harness.refusal(node.upload(payload))
        assert (status, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "NORM_OUT_OF_BOUNDS")
        assert text in said
        assert "learning rate" in said or "CENTRAL_LIMITS__MAX_NORM" in said


async def test_one_module_that_learnt_nothing_and_signed_scales_are_no_fault(
    tmp_path: Path,
) -> None:
    async with harness.running_central(harness.make_settings(tmp_path)) as central:
        node = await central.enroll("a", await central.token())
        modules = dict(harness.make_factors().modules)
        first, second = sorted(modules)
        modules[first] = replace(modules[first], B=np.zeros_like(modules[first].B))
        modules[second] = replace(modules[second], scale=-2.0)
        await node.upload(encode(LoraTensors(modules)))


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        central.join("shared", *NODES)
        yield central


def state_of(central: Central, update_id: str) -> tuple[str, str]:
    with central.journal.read() as state:
        return state.updates[update_id].state, state.updates[update_id].reason


HIDDEN = [name for name in REFUSED if "scale 1e" in name or name.startswith(("A ", "B "))]


@pytest.mark.parametrize(
    "rule", RULES, ids=lambda rule: "-".join(str(v) for v in rule.values() if isinstance(v, str))
)
@pytest.mark.parametrize(
    "what",
    [
        *HIDDEN[:1],
        "zero",
        *(
            pytest.param(what, marks=pytest.mark.slow)
            for what in (*HIDDEN[1:], "denormal", "no scale", "NaN")
        ),
    ],
)
def test_an_extreme_that_is_admitted_all_the_same_is_blamed_alone(
    central: Central, rule: dict[str, Any], what: str
) -> None:
    """As an older central, or another writer of the journal, may have admitted it."""
    honest = [central.admit(node, make_increment(number)) for number, node in enumerate(NODES[:7])]
    if what == "NaN":
        bad_tensors = changed(make_increment(9))
        bad_tensors.modules[NAMES[0]].A[0, 0] = np.nan
    else:
        bad_tensors = (
            changed(make_increment(9), **REFUSED[what][0]) if what in REFUSED else make_increment(9)
        )
    data = encode(bad_tensors)
    if what == "no scale":
        data = data.replace(b"scales", b"scale_")
    bad = admit_bytes(central, NODES[7], data)
    settings = make_settings(min_updates=7, **rule)
    take_steps(central, settings, lambda: central.head().manifest.version == 1)
    state, reason = state_of(central, bad)
    assert (state, "cannot be merged" in reason) == ("set_aside", True)
    blamed = [u for u in honest if "cannot be merged" in state_of(central, u)[1]]
    assert blamed == []
    assert "merged" in {state_of(central, update)[0] for update in honest}
    released = decode(central.blobs.read(central.head().manifest.payload.digest_sha256))
    assert released.modules, "the round is not empty"
    assert all(np.isfinite(m.A).all() and np.isfinite(m.B).all() for m in released.modules.values())


def admit_bytes(central: Central, node: str, data: bytes) -> str:
    from protos.manifest import Payload
    from tests.unit.central.builders import admitted, make_update

    payload = Payload(digest_sha256=central.blobs.put(data), size_bytes=len(data))
    update = make_update(central.head().manifest, node, 1, payload=payload)
    central.journal.append(admitted(update, "shared"))
    return update.digest


EDGES: list[dict[str, float]] = [
    {"a": 1e3, "b": 1e-3, "scale": 1.0},
    {"a": 1e-3, "b": 1e3, "scale": 1.0},
    {"a": 1e-6, "b": 1e-6, "scale": MAX_SCALE},
    {"a": 1e-12, "b": MAX_FACTOR_NORM / 100, "scale": MAX_SCALE},
    {"a": 1e-5, "b": 1e-5, "scale": 1e-1},
]


@pytest.mark.parametrize(
    "rule", RULES, ids=lambda rule: "-".join(str(v) for v in rule.values() if isinstance(v, str))
)
@pytest.mark.parametrize("edge", EDGES, ids=str)
def test_what_is_within_the_bounds_breaks_no_strategy(
    central: Central, rule: dict[str, Any], edge: dict[str, float]
) -> None:
    for number, node in enumerate(NODES[:6]):
        central.admit(node, make_increment(number))
    central.admit(NODES[7], changed(make_increment(9), **edge))
    take_steps(
        central, make_settings(min_updates=7, **rule), lambda: central.head().manifest.version == 1
    )
    released = decode(central.blobs.read(central.head().manifest.payload.digest_sha256))
    assert released.modules
    assert all(np.isfinite(m.A).all() and np.isfinite(m.B).all() for m in released.modules.values())


class Picky:
    """A strategy that fails on certain values: what flwr's may do one day."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Any) -> None:
        self.tries = 0
        honest = FedAvg.aggregate_train

        def aggregate(strategy: FedAvg, server_round: int, replies: Any) -> Any:
            messages = list(replies)
            self.tries += 1
            arrays = [message.content["arrays"][f"{NAMES[0]}/A"].numpy() for message in messages]
            if fails(arrays):
                raise ValueError("it does not like that")
            return honest(strategy, server_round, messages)

        monkeypatch.setattr(FedAvg, "aggregate_train", aggregate)


def marked(number: int) -> LoraTensors:
    tensors = make_increment(number)
    tensors.modules[NAMES[0]].A[0, 0] = 77.0
    return tensors


def is_marked(array: Any) -> bool:
    return bool(array[0, 0] == 77.0)


@pytest.mark.parametrize("position", range(5))
def test_an_error_of_a_strategy_finds_the_update_that_causes_it(
    central: Central, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    picky = Picky(monkeypatch, lambda arrays: any(map(is_marked, arrays)))
    ids = [
        central.admit(node, marked(n) if n == position else make_increment(n))
        for n, node in enumerate(NODES[:5])
    ]
    settings = make_settings(min_updates=4, strategy="FedAvg")
    take_steps(central, settings, lambda: central.head().manifest.version == 1)
    expected = ["merged"] * 5
    expected[position] = "set_aside"
    assert [state_of(central, update)[0] for update in ids] == expected
    assert "it does not like that" in state_of(central, ids[position])[1]
    assert picky.tries <= 2 + 1 + 2 * 3, "with the merge before and the one after"


def test_several_that_fail_are_found_one_after_the_other(
    central: Central, monkeypatch: pytest.MonkeyPatch
) -> None:
    Picky(monkeypatch, lambda arrays: any(map(is_marked, arrays)))
    ids = [
        central.admit(node, marked(n) if n in (1, 4) else make_increment(n))
        for n, node in enumerate(NODES[:6])
    ]
    take_steps(
        central,
        make_settings(min_updates=4, strategy="FedAvg"),
        lambda: central.head().manifest.version == 1,
    )
    assert [n for n, update in enumerate(ids) if state_of(central, update)[0] == "set_aside"] == [
        1,
        4,
    ]


@pytest.mark.parametrize("least", [2, 0])
def test_where_no_single_update_is_at_fault_none_is_set_aside(
    central: Central, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that fail only together, in different halves; and a strategy that always fails."""
    Picky(monkeypatch, lambda arrays: sum(map(is_marked, arrays)) >= least)
    ids = [
        central.admit(node, marked(n) if n in (0, 3) else make_increment(n))
        for n, node in enumerate(NODES[:4])
    ]
    with pytest.raises(
        StrategyFailed,
        match=r"No single update causes it, so none is set aside. Change CENTRAL_MERGE__",
    ):
        take_steps(central, make_settings(min_updates=4, strategy="FedAvg"), lambda: False)
    assert {state_of(central, update)[0] for update in ids} == {"planned"}


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 100])
def test_a_cause_is_found_in_a_bounded_number_of_tries(count: int) -> None:
    for bad in {0, count // 2, count - 1}:
        tried: list[Sequence[int]] = []

        def fails(kept: Sequence[int], bad: int = bad, tried: list[Sequence[int]] = tried) -> bool:
            tried.append(kept)
            return bad in kept

        assert find_cause(count, fails) == bad
        assert len(tried) <= 1 + 2 * (count - 1).bit_length()
    assert find_cause(count, lambda kept: True) is None
    assert find_cause(count, lambda kept: len(kept) == count) is (0 if count == 1 else None)
