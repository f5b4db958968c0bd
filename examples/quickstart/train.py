"""Training of the tiny base model; imported only when there is no cached one.

In: a `BaseRecipe` and an empty directory. Out: a Hugging Face model directory (LlamaForCausalLM,
safetensors, tokenizer, chat template, generation config). The same recipe, software and thread
count give the same weights.

Optimizers: Muon (Jordan et al. 2024, original learning-rate adjustment) for the 2-D weights of the
layers, AdamW for embedding and norms. While most batches of the first quarter are random-token
repeats, the model learns to copy.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from examples.quickstart.corpus import BaseRecipe, Example, corpus
from examples.quickstart.tokenizer import (
    BEGIN,
    END,
    PAD,
    SPECIAL_TOKENS,
    prompt_text,
    save_tokenizer,
    train_tokenizer,
)

Batch = tuple[torch.Tensor, torch.Tensor]
"""int64 [batch, length] token ids, float32 [batch, length] weight of predicting each token."""
Row = tuple[list[int], list[float]]
"""Token ids, and the weight of predicting each."""


def train_base(recipe: BaseRecipe, directory: Path, progress: Callable[[int, int], None]) -> None:
    """Train and save the base model; `progress(step, steps)` is called after every step."""
    torch.manual_seed(recipe.seed)
    draw = random.Random(f"batches/{recipe.seed}")
    examples = corpus(recipe)
    tokenizer = train_tokenizer(
        text for example in examples for text in (example.prompt, example.answer)
    )
    encoded = [encode(tokenizer, example, recipe.prompt_weight) for example in examples]
    model = build_model(recipe, tokenizer)
    train_rows(recipe, model, encoded, draw, progress)
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)


def train_rows(
    recipe: BaseRecipe,
    model: LlamaForCausalLM,
    encoded: list[Row],
    draw: random.Random,
    progress: Callable[[int, int], None],
) -> None:
    """Train `model` on `encoded`, in the order that `draw` gives."""
    muon, adam = optimizers(model, recipe)
    order: list[int] = []
    for step in range(recipe.steps):
        if step < recipe.steps * recipe.repeat_phase and draw.random() < recipe.repeat_share:
            batch = repeats(draw, recipe.batch, model.config.vocab_size)
        else:
            if len(order) < recipe.batch:
                order = draw.sample(range(len(encoded)), len(encoded))
            batch = pad([encoded[order.pop()] for _ in range(recipe.batch)])
        factor = rate(step, recipe)
        for optimizer, base in ((muon, recipe.muon_rate), (adam, recipe.adam_rate)):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
        loss = weighted_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        progress(step + 1, recipe.steps)


def build_model(recipe: BaseRecipe, tokenizer: Tokenizer) -> LlamaForCausalLM:
    ids = {
        "bos": tokenizer.token_to_id(BEGIN),
        "eos": tokenizer.token_to_id(END),
        "pad": tokenizer.token_to_id(PAD),
    }
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        intermediate_size=recipe.feed_forward,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["bos"], eos_token_id=ids["eos"], pad_token_id=ids["pad"], do_sample=False
    )
    return model


def optimizers(
    model: torch.nn.Module, recipe: BaseRecipe
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(
        matrices, lr=recipe.muon_rate, weight_decay=0.0, adjust_lr_fn="original"
    )
    return muon, torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)


def rate(step: int, recipe: BaseRecipe) -> float:
    """Share of the peak rate: warm-up, constant, then linear to the final share."""
    if step < recipe.warm_up:
        return (step + 1) / recipe.warm_up
    start = recipe.steps * recipe.constant_until
    if step < start:
        return 1.0
    return 1.0 - (1.0 - recipe.final_share) * (step - start) / (recipe.steps - start)


def encode(tokenizer: Tokenizer, example: Example, prompt_weight: float) -> Row:
    prompt = tokenizer.encode(prompt_text(example.prompt)).ids
    answer = tokenizer.encode(example.answer + END).ids
    return prompt + answer, [prompt_weight] * len(prompt) + [1.0] * len(answer)


def repeats(draw: random.Random, size: int, vocabulary: int) -> Batch:
    """Random token sequences written twice; only the second copy is scored."""
    length = draw.randint(8, 32)
    first = [
        [draw.randrange(len(SPECIAL_TOKENS), vocabulary) for _ in range(length)]
        for _ in range(size)
    ]
    ids = torch.tensor([row + row for row in first])
    weights = torch.cat([torch.zeros(size, length), torch.ones(size, length)], dim=1)
    return ids, weights


def pad(rows: list[Row]) -> Batch:
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in rows])
    weights = torch.tensor([row + [0.0] * (length - len(row)) for _, row in rows])
    return ids, weights


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy per unit of weight.

    Padding stands right of every real token, so causality masks it.
    """
    ids, weights = batch
    logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    scale = weights[:, 1:].flatten()
    return (losses * scale).sum() / scale.sum()
