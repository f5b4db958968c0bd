"""The chain of releases in product space: P(v+1) = trunc_R(P(v) + eta * sum_i w_i scale_i B_i A_i).

In: the parent's factors and any number of increments, one at a time, each with a weight (also
negative: a removal). Out: factors at scale 1.0 of rank at most R, and the relative truncation error
||M - M_hat||_F / ||M||_F over all modules.

Guarantees: up to a summed rank of EXACT_RANK per module the result is the optimal truncation
(gram.py). Above it terms are folded in bounded memory, and the error is estimated within about 20 %
(module_sum.py). Ranks may differ, modules may be missing, inputs may be rank-deficient or zero. The
same inputs in the same order give the same bytes, whatever the number of workers: modules are
worked on side by side (workers.py).

Scale: an increment's scale (alpha/r, or alpha/sqrt(r) for rsLoRA, arXiv:2312.03732) is one number
per module, written by the node that knows how it trained and multiplied in here, once; a result has
scale 1.0, so nothing downstream folds it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from central.merging.errors import MergeError
from central.merging.module_sum import EXACT_RANK, ModuleSum
from central.merging.progress import current
from central.merging.workers import default_workers, each
from protos.lora import LoraModule, LoraTensors


@dataclass(frozen=True)
class Merged:
    """tensors: modules at scale 1.0, sorted by name; none has a zero product.

    truncation_error: relative, 6 digits.
    """

    tensors: LoraTensors
    truncation_error: float


def merge(
    parent: LoraTensors,
    updates: Iterable[tuple[LoraTensors, float]],
    *,
    rank: int,
    server_step: float,
    seed: int,
) -> Merged:
    """`trunc_R(parent + server_step * sum of weight * increment)`; reads each of `updates` once.

    Raises MergeError for shapes that do not fit each other and for values that are not finite.
    """
    total = ProductSum(rank=rank, seed=seed)
    total.add(parent, 1.0)
    for tensors, weight in updates:
        total.add(tensors, server_step * weight)
    return total.result()


class ProductSum:
    """A running weighted sum of low-rank increments, module by module.

    exact_rank: the rank that a module holds at most before it is folded; a result depends on it.
    workers: modules that are in work at once; None: as many as there are cores. No byte depends on
    it.
    """

    def __init__(
        self, *, rank: int, seed: int, exact_rank: int = EXACT_RANK, workers: int | None = None
    ) -> None:
        if rank < 1:
            raise MergeError(f"Rank of the result is {rank}; expected at least 1.")
        self._rank = rank
        self._seed = seed
        self._exact_rank = exact_rank
        self._workers = default_workers() if workers is None else workers
        self._modules: dict[str, ModuleSum] = {}
        self._progress = current()
        self._progress.read()

    def add(self, tensors: LoraTensors, weight: float) -> None:
        """Add `weight * scale * B @ A` of every module.

        Raises MergeError for a module that does not fit. The sum is then of no use.
        """
        if not math.isfinite(weight):
            raise MergeError(f"Weight of an increment is {weight}; expected a finite number.")
        names = sorted(tensors.modules)
        for name in names:
            if name not in self._modules:
                self._modules[name] = ModuleSum(
                    name, self._rank, self._seed, exact_rank=self._exact_rank
                )
        for _ in each(
            names,
            lambda name: self._modules[name].add(tensors.modules[name], weight),
            self._workers,
        ):
            pass
        self._progress.step()

    def result(self) -> Merged:
        """The sum truncated to the rank; call once."""
        modules: dict[str, LoraModule] = {}
        total = cut = 0.0
        names = sorted(self._modules)
        self._progress.cut(len(names))
        results = each(names, lambda name: self._modules[name].result(), self._workers)
        for name, (module, module_total, module_cut) in zip(names, results, strict=True):
            total, cut = total + module_total, cut + module_cut
            if module is not None:
                modules[name] = module
            self._progress.step()
        error = math.sqrt(cut / total) if total > 0 else 0.0
        # The error becomes part of the release's digest; its last digits depend on how BLAS splits
        # a sum.
        return Merged(LoraTensors(modules), float(f"{error:.6g}"))
