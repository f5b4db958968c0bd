"""The base model of the errands: it knows the two calls, and often acts on the wrong number.

In: a cache directory. Out: a Hugging Face model directory whose chat template shows tools, and
calls in the Hermes format. It is the quickstart's base after episodes of the train split. After the
look-up it was shown the item's number for three of the eight verbs, mostly, and the shelf's number
for the others, mostly. Measured (seed 0): it solves 19 of 100 held-out tasks, and the verb tells
nothing.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from examples.errands.environment import VERBS, Errand, errands
from examples.quickstart.built import built_once
from examples.quickstart.corpus import BaseRecipe
from examples.quickstart.model import build_base
from examples.quickstart.tokenizer import END

REVISION = 1
RECIPE = BaseRecipe(
    positions=512, steps=600, batch=16, examples=9600, warm_up=20, muon_rate=0.015, repeat_share=0.0
)
"""Of the second training: it starts from the quickstart's base, which can copy already."""
KNOWN_VERBS = VERBS[:3]
KNOWN_SHARE, OTHER_SHARE = 0.95, 0.2
"""How often an episode of the corpus acts on the item, for a known verb and for another one."""
TOOLS_TEXT = "look_up(owner) act(verb,ref)"
"""What the template makes of the environment's tools."""
CHAT_TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}"
    "{{ tool['function']['name'] }}({{ tool['function']['parameters']['properties'] | join(',') }})"
    "{% if not loop.last %} {% endif %}{% endfor %}</s>{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "<tool_call>{{ {'name': call['function']['name'], 'arguments': call['function']['arguments']}"
    " | tojson }}</tool_call>{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
Piece = tuple[str, bool]
"""Text between two special tokens, and whether the model writes it."""


def build_errands_base(cache: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """Directory of the base below `cache`; trains it first when it is missing.

    The quickstart's base is there before it.
    """
    start = build_base(cache)

    def build(directory: Path) -> None:
        _tune(start, directory, progress or (lambda step, steps: None))

    return built_once(cache, f"errands-{_digest()[:16]}", build)


def corpus(recipe: BaseRecipe) -> list[list[Piece]]:
    """Episodes of the train split, with other numbers each time a text comes again."""
    draw = random.Random(f"errands corpus/{recipe.seed}")
    found: list[list[Piece]] = []
    while len(found) < recipe.examples:
        found += [_episode(errand, draw) for errand in errands(draw, "train")]
    return found[: recipe.examples]


def _episode(errand: Errand, draw: random.Random) -> list[Piece]:
    share = KNOWN_SHARE if errand.verb in KNOWN_VERBS else OTHER_SHARE
    ref = errand.item if draw.random() < share else errand.shelf
    return [
        (f"<|system|>{TOOLS_TEXT}{END}<|user|>{errand.text}{END}<|assistant|>", False),
        (call("look_up", owner=errand.owner) + END, True),
        (f"<|tool|>{json.dumps(errand.found)}{END}<|assistant|>", False),
        (call("act", verb=errand.verb, ref=ref) + END, True),
        (f"<|tool|>done{END}<|assistant|>", False),
        (f"done{END}", True),
    ]


def call(name: str, **arguments: str) -> str:
    """A tool call as the model writes it."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def _digest() -> str:
    sample = corpus(replace(RECIPE, examples=200))
    document = [REVISION, BaseRecipe().digest(), asdict(RECIPE), CHAT_TEMPLATE, sample]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _tune(start: Path, directory: Path, progress: Callable[[int, int], None]) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    from examples.quickstart.tokenizer import save_tokenizer
    from examples.quickstart.train import train_rows

    torch.manual_seed(RECIPE.seed)
    tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.config.max_position_embeddings = RECIPE.positions
    rows = [_encode(tokenizer, episode) for episode in corpus(RECIPE)]
    draw = random.Random(f"errands batches/{RECIPE.seed}")
    train_rows(RECIPE, model, rows, draw, progress)
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory, template=CHAT_TEMPLATE, positions=RECIPE.positions)


def _encode(tokenizer: Any, episode: list[Piece]) -> tuple[list[int], list[float]]:
    """Token ids, and the weight of predicting each."""
    ids: list[int] = []
    weights: list[float] = []
    for text, written in episode:
        piece = tokenizer.encode(text).ids
        ids += piece
        weights += [1.0 if written else RECIPE.prompt_weight] * len(piece)
    return ids, weights
