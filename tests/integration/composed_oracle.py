"""What a node must serve, from the base and the increments alone, and what it serves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from openai import OpenAI

from protos.lora import LoraTensors
from tests.fakes.tiny_model import SPECIALS, WORDS, tiny_model
from tests.integration.harness import Program

Dense = Mapping[str, npt.NDArray[np.float64]]
PROMPTS = [
    [len(SPECIALS) + (31 * number + step) % len(WORDS) for step in range(6)] for number in range(8)
]
TOP_TOKENS = 20


class Oracle:
    """Log-probabilities of the next token by transformers in float64."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float64)
        self._base = {name: value.clone() for name, value in self._model.state_dict().items()}

    def next_token(self, product: Dense) -> npt.NDArray[np.float64]:
        """Nats, [prompt, token], of the base with `product` added."""
        import torch

        changed = {f"{name}.weight": torch.from_numpy(value) for name, value in product.items()}
        weights = {name: value + changed.pop(name, 0) for name, value in self._base.items()}
        assert not changed, "a module that the model has not"
        self._model.load_state_dict(weights)
        with torch.no_grad():
            logits = self._model(torch.tensor(PROMPTS)).logits[:, -1]
        return np.asarray(torch.log_softmax(logits, -1))


def dense(*updates: LoraTensors) -> Dense:
    """Sum of the increments."""
    return {
        name: np.sum(
            [
                u.modules[name].scale * u.modules[name].B.astype(float) @ u.modules[name].A
                for u in updates
            ],
            0,
        )
        for name in updates[0].modules
    }


def first_pairs(product: Dense, rank: int) -> Dense:
    """The best approximation of this rank, module by module."""
    kept = {}
    for name, value in product.items():
        u, s, vt = np.linalg.svd(value, full_matrices=False)
        kept[name] = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return kept


def url_of(node: Program) -> str:
    return f"http://127.0.0.1:{node.settings['EDGE_SERVING__PORT']}"


def served(node: Program) -> tuple[str, list[dict[int, float]]]:
    """The one version that answered, and what it gave the likeliest next tokens of every prompt."""
    client = OpenAI(base_url=f"{url_of(node)}/v1", api_key="none", max_retries=0)
    answers = [
        client.completions.create(
            model="lorikeet",
            prompt=prompt,
            max_tokens=1,
            temperature=0,
            logprobs=TOP_TOKENS,
            extra_body={"return_tokens_as_token_ids": True},
        )
        for prompt in PROMPTS
    ]
    (version,) = {answer.model for answer in answers}
    found = [answer.choices[0].logprobs.top_logprobs[0] for answer in answers]  # type: ignore[union-attr,index]
    return version, [
        {int(token.removeprefix("token_id:")): value for token, value in top.items()}
        for top in found
    ]


def distance(found: list[dict[int, float]], oracle: npt.NDArray[np.float64]) -> float:
    """Mean of |found - oracle| in nats."""
    return float(
        np.mean(
            [
                abs(value - oracle[n, token])
                for n, top in enumerate(found)
                for token, value in top.items()
            ]
        )
    )
