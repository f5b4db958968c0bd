"""Robust filters as a part of planning: which of the due updates are merged, and how much of each.

In: a drafted plan, the merge policy, blobs. Out: the plan that is journaled. It has a factor for
each update that was clipped, and names what is left out, with the reason. So the plan alone says
what was merged: `central releases verify` needs no filter, and `explain` shows every decision. The
updates that are kept have equal weights. Reads payloads: call it without the journal's lock.

At most HELD_BYTES of increments are in memory at once, or two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import overload

import numpy as np

from central.blobs import BlobLost, BlobStore
from central.cohort.errors import LostUpdate, UnusableUpdate
from central.cohort.strategies.product_mean import read_increment
from central.journal import LeftOut, MergePlan, PlannedUpdate
from central.merging import Selection, clip_norms, keep_near, multi_krum, product_gram
from central.merging.errors import MergeError
from central.merging.gram import Matrix
from central.settings import MergePolicy
from protos.lora import LoraTensors

HELD_BYTES = 1 << 30


def screen_of(
    policy: MergePolicy, blobs: BlobStore
) -> Callable[[MergePlan, str], MergePlan] | None:
    """The policy's filter; None when it has none."""
    return None if policy.filter == "none" else partial(screen, policy=policy, blobs=blobs)


def screen(plan: MergePlan, parent: str, policy: MergePolicy, blobs: BlobStore) -> MergePlan:
    """The draft after the policy's filter; `parent` is the payload that it builds on.

    Raises UnusableUpdate for a payload that cannot be judged, LostUpdate for one that is lost while
    the store has the parent, and StorageError when the store is away.
    """
    stored = _Stored(plan.updates, blobs)
    try:
        block = max(1, HELD_BYTES // (2 * max(1, *map(stored.size, range(len(stored))))))
        gram = product_gram(stored, block=block)
    except BlobLost as error:
        blobs.read(parent)  # lost too: then it is the store that is away
        raise LostUpdate(stored.last, str(error)) from error
    except MergeError as error:
        # Features that do not fit the others'. The update that was read last brought them.
        raise UnusableUpdate(stored.last, str(error)) from error
    if policy.filter == "clip":
        return _clipped(plan, policy, gram)
    count = f"of {len(plan.updates)} updates"
    if policy.filter == "near":
        name = f"near, threshold {policy.filter_threshold:g}, {count}"
        return _selected(
            plan, name, "median distance to the others", keep_near(gram, policy.filter_threshold)
        )
    name = f"multi-krum, {policy.filter_malicious} malicious {count}"
    return _selected(plan, name, "Krum score", multi_krum(gram, policy.filter_malicious))


def _clipped(plan: MergePlan, policy: MergePolicy, gram: Matrix) -> MergePlan:
    factors = clip_norms(gram, policy.filter_norm)
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    limit = policy.filter_norm or float(np.median(norms))
    updates = [
        planned.model_copy(update={"factor": float(factor)})
        for planned, factor in zip(plan.updates, factors, strict=True)
    ]
    of = "" if policy.filter_norm else f", the median of {len(updates)} updates"
    return plan.model_copy(update={"filter": f"clip, norm {limit:.6g}{of}", "updates": updates})


def _selected(plan: MergePlan, name: str, score: str, selection: Selection) -> MergePlan:
    kept = set(selection.kept)
    left_out = [
        LeftOut(
            update_id=planned.update_id,
            reason=f"left out of a merge on {plan.parent[:8]} by the filter {name}: "
            f"its {score} is {selection.scores[i]:.4g}, "
            f"the largest accepted is {selection.limit:.4g}",
        )
        for i, planned in enumerate(plan.updates)
        if i not in kept
    ]
    weight = 1 / len(kept)
    changed = {
        "filter": name,
        "left_out": left_out,
        "updates": [plan.updates[i].model_copy(update={"weight": weight}) for i in selection.kept],
    }
    return plan.model_copy(update=changed)


class _Stored(Sequence[LoraTensors]):
    """A plan's increments, read when they are asked for. `last`: the update that was read last."""

    def __init__(self, updates: Sequence[PlannedUpdate], blobs: BlobStore) -> None:
        self._updates = updates
        self._blobs = blobs
        self.last = ""

    def __len__(self) -> int:
        return len(self._updates)

    def size(self, index: int) -> int:
        """Most bytes of the increment in memory: int8 grows fourfold. Raises StorageError."""
        self.last = self._updates[index].update_id
        return 4 * self._blobs.size(self._updates[index].payload)

    @overload
    def __getitem__(self, index: int) -> LoraTensors: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LoraTensors]: ...
    def __getitem__(self, index: int | slice) -> LoraTensors | Sequence[LoraTensors]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        update = self._updates[index]
        self.last = update.update_id
        return read_increment(self._blobs, update.update_id, update.payload)
