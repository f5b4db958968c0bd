"""The base as teacher: its last hidden states of a sample, and the logits that they make.

In: the base in transformers, token ids. Out: states, bfloat16 on disk, and float32 logits.
Guarantees: states that do not make the base's own logits are refused, be they another model's or
of a base whose logits are not made by its head alone. Importing this module loads torch, not TRL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edge_node.errors import SettingsError
from edge_node.learning.anchors import SETTING, Anchors, read_states

TOLERANCE = 0.1
"""Largest relative difference of logits from stored states and from the base itself. Measured on
SmolLM2-135M: 0.003 from rounding to bfloat16, 0.035 where the base computes in bfloat16.
"""


def head_logits(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Logits as `model` makes them of last hidden states, float32 [tokens, vocabulary]."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    logits = head(states.to(head.weight.dtype))
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    return logits.float()


def base_states(base: Any, ids: Sequence[int]) -> torch.Tensor:
    """The base's last hidden states of these tokens, after its last norm, [tokens, hidden]."""
    with torch.no_grad():
        row = torch.tensor([list(ids)], device=base.device)
        states: torch.Tensor = base.base_model(input_ids=row, use_cache=False).last_hidden_state[0]
    return states


def expect_base(base: Any, ids: Sequence[int], states: torch.Tensor, what: str) -> None:
    """Raises SettingsError when `states` of the tokens `ids` do not make the base's own logits.

    Either they are another model's, or its logits are not made by its head alone. `what` says
    whose states they are.
    """
    with torch.no_grad():
        logits = base(input_ids=torch.tensor([list(ids)], device=base.device)).logits[0].float()
        width = base.get_output_embeddings().weight.shape[1]
        difference = (
            _distance(head_logits(base, states.to(base.device)), logits)
            if states.shape[1] == width
            else float("inf")
        )
    if not difference <= TOLERANCE:
        raise SettingsError(
            f"{what} do not make the logits of this {type(base).__name__}: they differ by "
            f"{difference:.3g}, relative to its own; expected at most {TOLERANCE}. Make anchors "
            f"with `edge-node anchors make` of this version. Where that fails too, unset {SETTING} "
            "and use an anchor environment: the base makes its logits in a way of its own."
        )


def load_states(anchors: Anchors, base: Any) -> list[torch.Tensor]:
    """The stored states, after one sample's were compared with `base`; raises SettingsError."""
    states = read_states(anchors)
    expect_base(base, anchors.samples[0].ids, states[0], f"The states in {anchors.path}")
    return states


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, without what softmax does not see: a constant added to all logits of a token."""
    found, expected = (x - x.mean(-1, keepdim=True) for x in (found, expected))
    return float((found - expected).norm() / expected.norm())
