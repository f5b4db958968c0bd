"""Work and skill around SmolLM2: a customer's desk, checked questions, and English to measure.

In: a node's letter and a seed. Out: tasks and verdicts, or documents, as the environment contract
asks. Guarantees: standard library only apart from the contract; the same arguments give the same
tasks; train and held-out never share a text.

`Desk`: a shop's staff pass on what customers write. A house book, chosen by the seed, says which
team looks after a product, and which step follows a problem. A knows products 0 to 7 and problems 0
to 4, B products 4 to 11 and problems 3 to 7, C needs all of them.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from edge_node.environments import Document, Outcome, Split, Task
from examples.quickstart.house import split_of

Node = Literal["A", "B", "C"]

PRODUCTS = (
    *("kettle", "toaster", "lamp", "radio", "fan", "camera"),
    *("printer", "heater", "mixer", "drill", "vacuum", "clock"),
)
PROBLEMS = (
    ("is not the one I ordered", "is the wrong model"),
    ("arrived broken", "came in pieces"),
    ("never arrived", "has not come yet"),
    ("is far too loud", "makes a terrible noise"),
    ("does not turn on", "stays off when I press the button"),
    ("came without a cable", "had no cable in the box"),
    ("stopped after a week", "died within days"),
    ("was charged twice", "is on my bill two times"),
)
"""Each in two wordings."""
TEMPLATES = (
    "Order {order}: the {product} {problem}.",
    "Hello, my {product} {problem}. The order is {order}.",
    "The {product} from order {order} {problem}. What now?",
    "I bought a {product}, order {order}. It {problem}.",
)
TEAMS = ("Bern", "Oslo", "Lima", "Rome", "Cairo", "Delhi")
STEPS = ("visit", "refund", "replace", "call", "repair", "voucher", "trace", "resend")

NODE_PRODUCTS: Mapping[str, Sequence[str]] = {
    "A": PRODUCTS[0:8],
    "B": PRODUCTS[4:12],
    "C": PRODUCTS,
}
NODE_PROBLEMS: Mapping[str, Sequence[int]] = {"A": range(0, 5), "B": range(3, 8), "C": range(0, 8)}
QUESTIONS = Path(__file__).with_name("questions.jsonl")
ENGLISH = Path(__file__).with_name("english.txt")


def house_book(seed: int) -> tuple[dict[str, str], list[str]]:
    """Team of each product, every team two of them; and step of each problem, all different."""
    draw = random.Random(f"desk/book/{seed}")
    teams, steps = [*TEAMS, *TEAMS], list(STEPS)
    draw.shuffle(teams)
    draw.shuffle(steps)
    return dict(zip(PRODUCTS, teams, strict=True)), steps


class Desk:
    """`Order 143: the kettle is not the one I ordered.` -> `team Bern, step visit`."""

    def __init__(self, node: Node, seed: int = 0) -> None:
        if node not in NODE_PRODUCTS:
            raise ValueError(f"Unknown node {node!r}; expected one of {', '.join(NODE_PRODUCTS)}.")
        self._node = node
        self._seed = seed
        self._teams, self._steps = house_book(seed)

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        """`count` tasks with distinct texts; raises ValueError for an unknown split."""
        _check(split)
        draw = random.Random(f"desk/tasks/{self._node}/{self._seed}/{split}/{seed}")
        tasks: dict[str, Task] = {}
        while len(tasks) < count:
            product = draw.choice(NODE_PRODUCTS[self._node])
            problem = draw.choice(NODE_PROBLEMS[self._node])
            text = draw.choice(TEMPLATES).format(
                order=draw.randint(100, 999),
                product=product,
                problem=draw.choice(PROBLEMS[problem]),
            )
            if split_of(text) == split:
                answer = f"team {self._teams[product]}, step {self._steps[problem]}"
                tasks[text] = _task("desk", text, {"answer": answer})
        return list(tasks.values())

    def verify(self, task: Task, answer: str) -> Outcome:
        """Exact, but for spaces around it."""
        expected = str(task.data["answer"])
        if answer.strip() == expected:
            return Outcome(passed=True, score=1.0, reason="as the house book says", correction=None)
        return Outcome(
            passed=False, score=0.0, reason=f"expected {expected!r}", correction=expected
        )

    def reference_answer(self, task: Task) -> str:
        return str(task.data["answer"])


class Questions:
    """General questions with a word that a right answer holds.

    Nobody trains on them, so all of them are held out. The base's anchors
    (edge_node/learning/questions) are others.
    """

    def __init__(self) -> None:
        lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
        self._rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        """At most `count`, in an order of the seed's; none to train on.

        Raises ValueError for an unknown split.
        """
        _check(split)
        if split == "train":
            return []
        rows = list(self._rows)
        random.Random(f"questions/{seed}").shuffle(rows)
        return [
            _task("question", row["question"], {"answers": row["answers"]}) for row in rows[:count]
        ]

    def verify(self, task: Task, answer: str) -> Outcome:
        """Whether one of the task's answers is in it, as whole words in any case."""
        answers: Sequence[str] = task.data["answers"]
        passed = any(re.search(rf"(?i)(?<!\w){re.escape(word)}(?!\w)", answer) for word in answers)
        reason = "says it" if passed else f"expected {' or '.join(answers)} in it"
        return Outcome(passed, float(passed), reason, None if passed else answers[0])

    def reference_answer(self, task: Task) -> str:
        return str(task.data["answers"][0])


class EnglishText:
    """Paragraphs of plain English; nobody trains on them, so all of them are held out."""

    def __init__(self) -> None:
        paragraphs = ENGLISH.read_text(encoding="utf-8").split("\n\n")
        self._texts = [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()]

    def documents(self, split: Split, *, count: int, seed: int) -> Sequence[Document]:
        """At most `count`, in an order of the seed's; none to train on.

        Raises ValueError for an unknown split.
        """
        _check(split)
        if split == "train":
            return []
        texts = list(self._texts)
        random.Random(f"english/{seed}").shuffle(texts)
        return [Document(_name("english", text), text) for text in texts[:count]]


def _task(kind: str, text: str, data: Mapping[str, Any]) -> Task:
    return Task(_name(kind, text), [{"role": "user", "content": text}], data)


def _name(kind: str, text: str) -> str:
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _check(split: str) -> None:
    if split not in get_args(Split):
        raise ValueError(f"Unknown split {split!r}; expected one of {', '.join(get_args(Split))}.")
