"""The tiny model with an adapter merged in: answers and log-probabilities by seed, in this process.

In: adapters, prompts in token ids. Out: `rollouts.Answer`s; the same for the same adapter, prompt
and seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_node.learning.rollouts import Answer
from protos.lora import LoraTensors
from tests.fakes.tiny_model import tiny_model

END = 2


class TinySampler:
    def __init__(self) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()
        self._weights = {name: w.clone() for name, w in self._model.state_dict().items()}
        self._tokenizer = AutoTokenizer.from_pretrained(tiny_model())

    def use(self, adapter: LoraTensors) -> None:
        """From now on answers are those of the base with this adapter of scale 1."""
        self._model.load_state_dict(self._weights)
        for name, module in adapter.modules.items():
            self._model.get_submodule(name).weight.data += torch.from_numpy(module.B @ module.A)

    def prompt_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def answers(
        self, prompt_ids: Sequence[int], *, samples: int, seed: int, max_tokens: int, greedy: bool
    ) -> list[Answer]:
        dice = torch.Generator().manual_seed(seed)
        ids = torch.tensor([list(prompt_ids)] * samples)
        drawn, logprobs = [], []
        for _ in range(max_tokens):
            logits: Any = self._model(ids).logits[:, -1]
            log_p = torch.log_softmax(logits, -1)
            tokens = (
                log_p.argmax(-1, keepdim=True)
                if greedy
                else torch.multinomial(log_p.exp(), 1, generator=dice)
            )
            ids = torch.cat([ids, tokens], 1)
            drawn.append(tokens)
            logprobs.append(log_p.gather(1, tokens))
        pairs = zip(torch.cat(drawn, 1).tolist(), torch.cat(logprobs, 1).tolist(), strict=True)
        return [self._answer(tokens, numbers) for tokens, numbers in pairs]

    def _answer(self, tokens: list[int], logprobs: list[float]) -> Answer:
        length = tokens.index(END) + 1 if END in tokens else len(tokens)
        text = self._tokenizer.decode(tokens[:length], skip_special_tokens=True)
        return Answer(tokens[:length], logprobs[:length], text)
