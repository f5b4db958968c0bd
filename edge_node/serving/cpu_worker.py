"""vLLM's worker on CPU, with requests that have a seed of their own and come in chunks.

In: vLLM's own worker and model runner. Out: the same, in which a sampled token that does not count
takes nothing from the random numbers of its request. Guarantee: a request with a seed gets the same
answer, whether its prompt is computed at once or in parts beside others.

While a prompt is computed in parts, vLLM 0.32 samples a token after each part and drops it. It
then sets the request's generator back by an offset, which only a GPU's generator has. On CPU that
ended the engine, and every other request with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from edge_node.serving.internals import check_cpu_worker


class SeededRunner(CPUModelRunner):  # type: ignore[misc]
    """Keeps the state of the generators whose token will be dropped, and brings it back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._before: dict[int, Any] = {}
        """By row of the batch: a generator's state before it sampled."""

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        dropped = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]
        self._before = {
            row: generators[row].get_state() for row in map(int, dropped) if row in generators
        }
        return super()._sample(*args, **kwargs)

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        hidden = {row: generators.pop(row) for row in self._before}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            for row, generator in hidden.items():
                generator.set_state(self._before[row])
            generators.update(hidden)
            self._before = {}


check_cpu_worker()
cpu_worker.CPUModelRunner = SeededRunner
CpuWorker = cpu_worker.CPUWorker
"""What `--worker-cls` names; it makes its runner by the name that was just replaced."""
