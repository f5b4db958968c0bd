"""What capture costs: CPU time of an answer, from its bytes to the disk.

In: nothing. Out: figures; with `--json` one object as the last line. Each case takes the node's own
steps on the same answers: to an interaction, redaction of texts and token ids, and a durable
transaction for each 32 of them. A prompt has 600 characters, an answer 200, and one in twenty an
e-mail address. Cases are interleaved in rounds of one run; a ratio is the median of paired ones.

Run: `python -m benchmarks.capture [--json] [--seed 0]`; about a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks import describe_machine
from edge_node.capture import (
    Finished,
    Generation,
    Redaction,
    Served,
    TokenTexts,
    load_redactor,
    to_interaction,
)
from edge_node.experience import ExperienceStore
from edge_node.experience.sealing import CLEAR, Sealing

ROUNDS, ANSWERS, GROUP = 12, 320, 32
CASES = {
    "plain": ("off", False),
    "redaction": ("default", False),
    "encryption": ("off", True),
    "both": ("default", True),
}
WORDS = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text().split()
BARS_US = {"both": 500.0}
"""Most CPU time of an answer that a node on this kind of machine should spend."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    texts = make_texts()
    answers = make_answers(texts, random.Random(options.seed))
    spent: dict[str, list[float]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            for name, (redactor, sealed) in CASES.items():
                redaction = Redaction(load_redactor(redactor), texts)
                store = ExperienceStore(
                    Path(folder) / f"{name}-{number}.db",
                    sealing=Sealing([os.urandom(32)]) if sealed else CLEAR,
                )
                spent[name].append(cpu_us(answers, redaction, store))
                store.close()
            print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
    result: dict[str, Any] = {
        "cpu_us_per_answer": {
            name: round(statistics.median(all), 1) for name, all in spent.items()
        },
        "ratio_to_plain": {
            name: round(statistics.median(map(_ratio, all, spent["plain"])), 3)
            for name, all in spent.items()
        },
        "rounds": {name: [round(one, 1) for one in all] for name, all in spent.items()},
        "seed": options.seed,
        "machine": describe_machine(),
    }
    result["bars"] = {
        f"{name} at most {most:g} us": result["cpu_us_per_answer"][name] <= most
        for name, most in BARS_US.items()
    }
    for name in CASES:
        print(
            f"{name:12} {result['cpu_us_per_answer'][name]:8.1f} us of CPU an answer, "
            f"{result['ratio_to_plain'][name]:.2f} x plain",
            file=sys.stderr,
        )
    if options.json:
        print(json.dumps(result))


def cpu_us(answers: list[Finished], redaction: Redaction, store: ExperienceStore) -> float:
    """Microseconds of CPU for each of `answers`, of this process."""
    begins = time.process_time()
    for start in range(0, len(answers), GROUP):
        made = [to_interaction(answer) for answer in answers[start : start + GROUP]]
        store.add_interactions([redaction.interaction(one) for one in made if one])
    return (time.process_time() - begins) / len(answers) * 1e6


def make_texts() -> TokenTexts:
    """A byte-level tokenizer of 4,000 tokens, as most models have one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    return TokenTexts(_Backend(tokenizer))


class _Backend:
    """As transformers wraps it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend_tokenizer = tokenizer


def make_answers(texts: TokenTexts, random_: random.Random) -> list[Finished]:
    made = []
    for number in range(ANSWERS):
        prompt, answer = _text(random_, 600), _text(random_, 200)
        if number % 20 == 0:
            prompt += " Write to anna.schmidt@example.org, please."
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer},
            "finish_reason": "stop",
        }
        body = {"id": f"chatcmpl-{number:032x}", "model": "lorikeet@v1", "choices": [choice]}
        request = {"messages": [{"role": "user", "content": prompt}]}
        ids = Generation(True, texts.ids(f"user: {prompt}\n"), texts.ids(answer))
        made.append(
            Finished(
                "/v1/chat/completions",
                request,
                [json.dumps(body).encode()],
                False,
                "2026-11-27T00:00:00+00:00",
                Served([ids]),
            )
        )
    return made


def _text(random_: random.Random, characters: int) -> str:
    text = ""
    while len(text) < characters:
        text += random_.choice(WORDS) + " "
    return text[:characters]


def _ratio(case: float, plain: float) -> float:
    return case / plain


if __name__ == "__main__":
    main()
