"""An update on which a merge breaks is blamed, in whichever step the library gives up."""

from __future__ import annotations

import numpy as np
import pytest

from central.cohort import payload
from central.cohort.errors import FederationError, StrategyFailed, UnusableUpdate
from central.cohort.payload import plan_replies
from central.cohort.strategies.flower import make_strategy
from central.cohort.strategies.product_mean import ProductMean, Start
from central.journal import MergePlan, PlannedUpdate
from central.merging import Merged, ProductSum, module_sum
from central.merging.gram import Matrix, Truncated, truncate
from protos.lora import Array, LoraModule, LoraTensors, encode
from protos.manifest import sha256_hex

COUNT, BAD, MARK = 20, 13, np.float32(1234.5)
LARGE = 300.0


class Held(dict[str, bytes]):
    def put(self, tensors: LoraTensors) -> str:
        data = encode(tensors)
        self[sha256_hex(data)] = data
        return sha256_hex(data)

    def read(self, digest: str) -> bytes:
        return self[digest]


def increment(number: int) -> LoraTensors:
    rng = np.random.default_rng(number)
    A = rng.standard_normal((4, 8), np.float32)
    if number == BAD:
        A[0, 0] = MARK
    return LoraTensors({"m": LoraModule(A, rng.standard_normal((8, 4), np.float32))})


def make_plan(updates: list[PlannedUpdate], strategy: str = "product-mean") -> MergePlan:
    return MergePlan(
        cohort="shared",
        parent="0" * 64,
        version=1,
        base="0" * 64,
        rank=2,
        server_step=1.0,
        seed=1,
        exact_rank=1,  # folds above a summed rank of 16
        strategy=strategy,
        updates=updates,
        software="a test",
        created_at="2026-01-01T00:00:00.000000Z",
    )


def test_an_error_while_an_increment_is_added_finds_the_update_that_causes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def breaks(A: Array, B: Array, d: Matrix, rank: int) -> Truncated:
        if MARK in A:
            raise np.linalg.LinAlgError("SVD did not converge")
        return truncate(A, B, d, rank)

    monkeypatch.setattr(module_sum, "truncate", breaks)
    held = Held()
    updates = [
        PlannedUpdate(update_id=f"{n:064x}", payload=held.put(increment(n)), weight=1 / COUNT)
        for n in range(COUNT)
    ]
    plan = make_plan(updates)
    strategy = ProductMean(plan, Start(held.put(LoraTensors())), held)
    with pytest.raises(UnusableUpdate, match="SVD did not converge") as caught:
        strategy.aggregate_train(1, plan_replies(plan))
    assert caught.value.update_id == updates[BAD].update_id


class Fragile(ProductSum):
    """Breaks on large terms, as a library may: where they are added, or at the end."""

    where = "add"
    large = False

    def add(self, tensors: LoraTensors, weight: float) -> None:
        super().add(tensors, weight)
        self.large |= any(np.linalg.norm(m.B @ m.A) > LARGE for m in tensors.modules.values())
        self._break("add")

    def result(self) -> Merged:
        self._break("result")
        return super().result()

    def _break(self, where: str) -> None:
        if self.large and where == self.where:
            raise np.linalg.LinAlgError("SVD did not converge")


def compose(
    monkeypatch: pytest.MonkeyPatch,
    where: str = "result",
    *,
    large: int | str = "",
    count: int = 4,
    strategy: str = "product-mean",
) -> None:
    """Build the payload of a cohort that builds on another. What is `large` breaks the sum."""
    held = Held()
    monkeypatch.setattr(payload, "ProductSum", type("_", (Fragile,), {"where": where}))

    def put(number: int | str) -> str:
        module = increment(0 if number == "other" else int(number)).modules["m"]
        factor = np.float32(1e3 if number == large else 1)
        return held.put(LoraTensors({"m": LoraModule(module.A, factor * module.B)}))

    updates = [
        PlannedUpdate(update_id=f"{n:064x}", payload=put(n), weight=1 / count) for n in range(count)
    ]
    plan, start = make_plan(updates, strategy), Start(held.put(LoraTensors()))
    standing = payload.Standing(start, other=put("other"))
    messages = plan_replies(plan)
    payload.build_payload(plan, standing, make_strategy(plan, start, held), held, messages)


@pytest.mark.parametrize("where", ["add", "result"])
def test_an_update_on_which_the_composition_breaks_is_blamed(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    compose(monkeypatch, where)
    with pytest.raises(UnusableUpdate, match="SVD did not converge") as caught:
        compose(monkeypatch, where, large=2)
    assert caught.value.update_id == f"{2:064x}"


@pytest.mark.parametrize(
    ("large", "count", "strategy", "error"),
    [
        ("other", 4, "product-mean", StrategyFailed),
        (2, 4, "FedAvg", StrategyFailed),
        ("other", 0, "product-mean", FederationError),
    ],
)
def test_where_no_update_alone_breaks_the_composition_none_is_blamed(
    monkeypatch: pytest.MonkeyPatch,
    large: int | str,
    count: int,
    strategy: str,
    error: type[Exception],
) -> None:
    with pytest.raises(FederationError, match="that the cohort builds on cannot be comp") as caught:
        compose(monkeypatch, large=large, count=count, strategy=strategy)
    assert type(caught.value) is error
