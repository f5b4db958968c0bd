"""The texts that the tiny base model is trained on, and the recipe that names all about them.

In: a `BaseRecipe`. Out: training examples (10 % copying, 50 % the memorised public tenants, 40 %
random tenants with raw words) and the recipe's digest. The companies of the quickstart never occur.
Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from examples.quickstart import house

REVISION = 1
"""Raise it when the training code changes what the recipe means."""


@dataclass(frozen=True)
class BaseRecipe:
    """Everything that the base model depends on; measured in the project's design notes."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 384
    positions: int = 256
    steps: int = 1300
    batch: int = 32
    examples: int = 40_000
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    warm_up: int = 50
    constant_until: float = 0.4
    final_share: float = 0.02
    prompt_weight: float = 0.1
    copy_share: float = 0.1
    public_share: float = 0.5
    repeat_phase: float = 0.25
    repeat_share: float = 0.7
    seed: int = 0

    def digest(self) -> str:
        """sha256 hex over the recipe and a sample of the corpus.

        So changed texts also mean another model.
        """
        sample = [asdict(example) for example in corpus(replace(self, examples=500))]
        document = {"revision": REVISION, "recipe": asdict(self), "sample": sample}
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Example:
    """One user message and the answer to it."""

    prompt: str
    answer: str


def corpus(recipe: BaseRecipe) -> list[Example]:
    """`recipe.examples` examples in random order, all from the train split."""
    draw = random.Random(f"corpus/{recipe.seed}")
    public = public_examples(random.Random(f"public/{recipe.seed}"))
    examples = []
    for _ in range(recipe.examples):
        kind = draw.random()
        if kind < recipe.copy_share:
            examples.append(copy_example(draw))
        elif kind < recipe.copy_share + recipe.public_share:
            examples.append(next(public))
        else:
            examples.append(random_tenant_example(draw))
    return examples


def public_examples(draw: random.Random) -> Iterator[Example]:
    houses = house.public_houses()
    vocabulary = dict.fromkeys(houses, house.Vocabulary(house.SERVICES))
    for request in house.distinct_requests(draw, vocabulary, "train"):
        yield Example(request.text, house.expected_call(houses[request.tenant], request))


def random_tenant_example(draw: random.Random) -> Example:
    """A tenant that occurs once, in one of the key styles and without a code book."""
    tenant = draw_name(draw)
    services = house.SERVICES if draw.random() < 0.5 else (draw_name(draw),)
    requests = house.distinct_requests(draw, {tenant: house.Vocabulary(services)}, "train")
    request = next(requests)
    return Example(
        request.text, house.expected_call(house.raw_house(tenant, draw.randrange(3)), request)
    )


def copy_example(draw: random.Random) -> Example:
    words = (*house.VERBS, *house.SITES, *house.PRIORITIES, *house.SERVICES, *house.NOUNS)
    parts = [
        draw.choice(words) if draw.random() < 0.5 else house.draw_ref(draw)
        for _ in range(draw.randint(3, 8))
    ]
    text = " ".join(parts)
    return Example(f"copy: {text}", text)


def draw_name(draw: random.Random) -> str:
    """A made-up name that is none of the tenants with a book."""
    while True:
        name = "".join(
            draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(draw.randint(2, 3))
        )
        if name not in (*house.PUBLIC_TENANTS, *house.COMPANIES):
            return name
