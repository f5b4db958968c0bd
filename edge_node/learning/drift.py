"""How far a round has moved the model from the release that it started from: `kl_release`.

In: the trained PeftModel, whose frozen weights are the release, and tokens. Out: KL(model ||
release), in nats, mean over answer tokens. An sft round knows both distributions of each token of
its own examples. A grpo round has the model's own samples; their mean of r - 1 - ln r, where r is
release over model, is the same divergence without bias and never negative (the estimator k3 of
http://joschu.net/blog/kl-approx.html, as in GRPO, arXiv:2402.03300, equation 4). Nothing here has
a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax

from edge_node.learning.batches import IGNORED, TokenRow


def kl_of_examples(trainer: Any, rows: Sequence[TokenRow]) -> float:
    """Over the answers of `rows`, whose every token has all log-probabilities.

    Row by row, as the logits of a batch may be large.
    """
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    total, tokens = 0.0, 0
    for row in rows:
        learnt = torch.tensor(row.labels[1:]) != IGNORED
        mine = _log_probabilities(trainer, model, row, learnt)
        with model.disable_adapter():
            release = _log_probabilities(trainer, model, row, learnt)
        total += kl_div(release, mine, reduction="sum", log_target=True).item()
        tokens += int(learnt.sum())
    return total / max(1, tokens)


def kl_of_samples(mine: torch.Tensor, release: torch.Tensor, mask: torch.Tensor) -> float:
    """Over answers that the model sampled.

    Args:
        mine, release: log-probabilities of the sampled tokens, float [answers, tokens].
        mask: which of them count, same shape.
    """
    log_ratio = (release - mine)[mask.bool()].double()
    if not len(log_ratio):
        return 0.0
    return float((torch.expm1(log_ratio) - log_ratio).mean())


def _log_probabilities(
    trainer: Any, model: Any, row: TokenRow, learnt: torch.Tensor
) -> torch.Tensor:
    """float32 [answer tokens, vocabulary]"""
    ids = torch.tensor([row.input_ids], device=trainer.accelerator.device)
    with torch.no_grad(), trainer.accelerator.autocast():
        logits = model(input_ids=ids).logits[0, :-1]
    return log_softmax(logits[learnt.to(logits.device)].float(), -1)
