"""Activation statistics of a round, sketched: what central's rule regmean weighs an increment with (loading this loads torch).

In: the trained PeftModel, token rows of the node's own examples, a rank, a seed. Out: per module a section `gram/<module>` of the
update, `U` float32 [in_features, k] and `c` float32 [], for G = c I + U U^T close to

    G = sum_t |g_t|^2 x_t x_t^T    (x: the module's input, g: the gradient of the answers' summed cross-entropy at its output)

over all tokens t, divided by its mean diagonal. The gradient is taken at the half point, start + dW / 2: at the end of a round
gradients vanish, at its start they point at other tokens (measured). U holds the k leading eigenpairs, c the mean of the rest.

G itself has in_features^2 numbers. It is never built: Y = G Omega is summed for a Gaussian Omega of 2 k + 8 columns, and the
eigenpairs are read from Y (Nystroem, for a matrix that streams by: Tropp, Yurtsever, Udell, Cevher, arXiv:1706.05736,
algorithm 3). The same model, rows and seed give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer

from edge_node.learning.batches import TokenRow
from protos.lora import Array

SECTION = "gram/"
EXAMPLES = 100
"""Own examples that the statistics are taken from."""
_PREFIX = "base_model.model."


def sketch_grams(model: Any, rows: Sequence[TokenRow], *, rank: int, seed: int) -> dict[str, Mapping[str, Array]]:
    """Sections of every module that gradients reach; none without rows. Leaves the model as it was, without gradients."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with _half_point(model), _observed(model, rank, seed) as sketches:
        for row in rows:
            ids = torch.tensor([row.input_ids], device=device)
            labels = torch.tensor(row.labels[1:], device=device)
            logits = model(input_ids=ids).logits[0, :-1].float()
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            model.zero_grad(set_to_none=True)
    model.train(training)
    return {SECTION + name: sections for name, sketch in sorted(sketches.items()) if (sections := sketch.result(rank))}


@contextmanager
def _half_point(model: Any) -> Iterator[None]:
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    kept = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: scale / 2 for name, scale in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling.update(scaling)


@contextmanager
def _observed(model: Any, rank: int, seed: int) -> Iterator[dict[str, _Sketch]]:
    sketches: dict[str, _Sketch] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            sketch = sketches[name.removeprefix(_PREFIX)] = _Sketch(layer.in_features, 2 * rank + 8, seed)
            hooks.append(layer.register_forward_hook(sketch.observe))
    try:
        yield sketches
    finally:
        for hook in hooks:
            hook.remove()


class _Sketch:
    """Y = G Omega and trace(G) of one module, summed over what passes through it."""

    def __init__(self, features: int, columns: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn(features, min(columns, features), generator=generator, dtype=torch.float64)
        self._omega = torch.linalg.qr(gaussian)[0]
        self._image = torch.zeros_like(self._omega)
        self._trace = 0.0

    def observe(self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Forward hook: adds the module's tokens once their gradients are there."""
        del layer
        x = inputs[0].detach()
        if output.requires_grad:
            output.register_hook(lambda gradient: self._add(x, gradient))

    def _add(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        tokens = x.reshape(-1, x.shape[-1]).to(torch.float64)
        weights = gradient.reshape(tokens.shape[0], -1).to(torch.float64).square().sum(1)
        if self._omega.device != tokens.device:
            self._omega, self._image = self._omega.to(tokens.device), self._image.to(tokens.device)
        self._image += tokens.T @ (weights[:, None] * (tokens @ self._omega))
        self._trace += float(weights @ tokens.square().sum(1))

    def result(self, rank: int) -> dict[str, Array]:
        """`U` and `c`; empty when nothing was seen."""
        features = self._omega.shape[0]
        if not self._trace > 0:
            return {}
        image = self._image / (self._trace / features)
        # Shifted by the rounding of Y, so that the core stays positive definite; the eigenvalues lose it again.
        shift = float(torch.finfo(torch.float64).eps) * features**0.5 * float(torch.linalg.matrix_norm(image))
        shifted = image + shift * self._omega
        core = torch.linalg.cholesky((self._omega.T @ shifted + shifted.T @ self._omega) / 2)
        vectors, roots, _ = torch.linalg.svd(
            torch.linalg.solve_triangular(core.T, shifted, upper=True, left=False), full_matrices=False
        )
        values = (roots.square() - shift).clamp(min=0)[:rank]
        rest = max(features - float(values.sum()), 0.0) / (features - len(values)) if features > len(values) else 0.0
        U = vectors[:, : len(values)] * (values - rest).clamp(min=0).sqrt()
        return {
            "U": np.ascontiguousarray(U.cpu().numpy().astype(np.float32)),
            "c": np.asarray(rest, np.float32),
        }
