"""Gradient-weighted RegMean as a strategy: every increment counts most on the inputs that its node worked on.

In: replies that name updates by digest; their payloads may carry sketches of activation statistics (sections `gram/<module>`).
Out: the next release. Increments from any start are merged: `P(v+1) = trunc_R(P(v) + eta * U)` with U from central/merging/regmean.py.

With `resolve` the entries are absolute solutions, W_i = P(start_i) + dW_i, of every node's latest update and not only of the new
ones, and `P(v+1) = trunc_R((1 - eta) P(v) + eta * U)`: what a node learnt earlier is weighed anew against what others learnt since,
and a slow node's part does not fade. (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1 needs no increments of the past: starts are releases,
and central has them.

An update without sketches counts as one whose inputs lie in all directions alike; so a node that does not send them is merged too.
Limit: every update of the plan is in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from central.errors import SettingsError
from central.federation.errors import UnusableUpdate
from central.federation.strategy import UPDATE, Blobs, MergeTerms, ProductMean, empty_sum
from central.merging import Merged, regmean
from central.merging.errors import MergeError
from central.merging.regmean import check_sketches
from protos.lora import LoraCodecError, LoraModule, LoraTensors, decode
from protos.prefix import prefix


class Options(BaseModel):
    """CENTRAL_MERGE__STRATEGY_OPTIONS of the strategy regmean."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    eps: float = Field(default=0.1, gt=0)
    """Added to every sketch, beside a mean diagonal of one: a large one is the product mean."""
    sketch_rank: int = Field(default=16, ge=1, le=256)
    """Rank of the sketches that nodes are asked for."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Options:
        """Raises SettingsError for options that are none."""
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise SettingsError(
                f"CENTRAL_MERGE__STRATEGY_OPTIONS: regmean: {where}: {first['msg']} (value {first['input']!r}). "
                f"Expected {' and '.join(cls.model_fields)}."
            ) from error


class RegMean(ProductMean):
    """See the module's docstring. Raises SettingsError for options that are none."""

    def __init__(self, options: Mapping[str, Any], blobs: Blobs) -> None:
        super().__init__(blobs)
        self._options = Options.of(options)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The standing offer, which asks for sketches too."""
        config["gram_rank"] = self._options.sketch_rank
        return super().configure_train(server_round, arrays, config, grid)

    def _merge(self, terms: MergeTerms, messages: Sequence[Message]) -> Merged:
        entries = list(self._entries(terms, messages))
        total = empty_sum(terms)
        kept = 1.0 - terms.server_step if terms.resolve else 1.0
        if kept:
            total.add(decode(self._blobs.read(terms.parent_payload)), kept)
        total.add(regmean(entries, eps=self._options.eps), terms.server_step)
        return total.result()

    def _entries(self, terms: MergeTerms, messages: Sequence[Message]) -> Iterable[tuple[LoraTensors, float]]:
        starts: dict[tuple[str, int], LoraTensors] = {}
        for message, (update_id, tensors, weight) in zip(messages, self._increments(messages), strict=True):
            try:
                check_sketches(tensors)
                if terms.resolve:
                    update = message.content[UPDATE]
                    start = (str(update["start_payload"]), int(update["start_rank"]))
                    if start not in starts:
                        starts[start] = self._start(*start)
                    tensors = _plus(starts[start], tensors)
            except (MergeError, LoraCodecError) as error:
                raise UnusableUpdate(update_id, str(error)) from error
            yield tensors, weight

    def _start(self, payload: str, rank: int) -> LoraTensors:
        release = decode(self._blobs.read(payload))
        return prefix(release, rank).tensors if rank else release


def _plus(release: LoraTensors, increment: LoraTensors) -> LoraTensors:
    """The sum of both as factors of their summed rank, with the increment's sections."""
    modules = dict(release.modules)
    for name, module in increment.modules.items():
        start = release.modules.get(name)
        if start is not None and start.A.shape[1] == module.A.shape[1] and start.B.shape[0] == module.B.shape[0]:
            scale = np.float32(module.scale)
            module = LoraModule(
                np.concatenate([start.A, module.A]), np.concatenate([start.B, scale * module.B], axis=1), 1.0
            )
        elif start is not None:
            raise MergeError(f"Module {name!r} has other features than the release that the update starts from.", name)
        modules[name] = module
    return LoraTensors(modules, increment.sections)
