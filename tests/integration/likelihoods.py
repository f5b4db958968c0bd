"""Log-probabilities of a prompt's tokens: a vLLM node's, and those of transformers with PEFT.

In: token ids, an adapter's directory. Out: natural logarithms, one for each token after the first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.fakes.tiny_model import tiny_model


def of_answer(choice: dict[str, Any], ids: list[int]) -> list[float]:
    """From a completion's choice with `prompt_logprobs`."""
    assert choice["prompt_logprobs"][0] is None, "nothing comes before the first token"
    return [
        float(entry[str(token)]["logprob"])
        for entry, token in zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)
    ]


def of_transformers(ids: list[int], adapter: Path | None) -> list[float]:
    """In float32; `adapter` is a PEFT directory, None the base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0]
    found = torch.log_softmax(logits.double(), dim=-1)
    return [float(found[i, token]) for i, token in enumerate(ids[1:])]
