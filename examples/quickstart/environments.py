"""The quickstart's environments: customer tool APIs, and what the base model already knew.

In: a node's letter and a seed. Out: tasks and verdicts, as the environment contract asks.
Guarantees: standard library only apart from the contract; the same arguments give the same tasks;
the splits never share a text. `seed` chooses the companies' code books, so another seed is another
world; the public tenants are always the same.

- A: acme, first half of its services, words and sites. B: acme, another half (the same code book,
overlapping words). - C: acme, services of its own, all words; never trained: it needs what A and B
learnt. - D: zeta, services and words of A, a contradicting code book; only the tenant tag tells
them apart. - E: juno, raw words in one key style; for the benchmark of learning from verifiers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from edge_node.environments import Outcome, Split, Task
from examples.quickstart import house
from examples.quickstart.house import House, Request, Vocabulary
from examples.quickstart.verifier import CallError, check_call, new_database

Node = Literal["A", "B", "C", "D", "E"]

NODE_COMPANY: Mapping[str, str] = {"A": "acme", "B": "acme", "C": "acme", "D": "zeta", "E": "juno"}
NODE_VOCABULARY: Mapping[str, Vocabulary] = {
    "A": Vocabulary(house.SERVICES[0:4], house.VERBS[0:8], house.SITES[0:8], house.PRIORITIES[0:3]),
    "B": Vocabulary(
        house.SERVICES[4:8], house.VERBS[4:12], house.SITES[4:12], house.PRIORITIES[1:4]
    ),
    "C": Vocabulary(house.SERVICES[8:11]),
    "D": Vocabulary(house.SERVICES[0:4], house.VERBS[0:8], house.SITES[0:8], house.PRIORITIES[0:3]),
    # Words for which the base seldom takes this company's style by itself.
    "E": Vocabulary(
        house.SERVICES[0:4],
        ("merge", "hold", "open", "move"),
        ("lyon", "quito", "oslo", "perth"),
        ("low",),
    ),
}


class ToolApi:
    """Requests of some tenants, answered by one call to their API."""

    def __init__(
        self,
        name: str,
        houses: Mapping[str, House],
        vocabularies: Mapping[str, Vocabulary],
        seed: int,
    ) -> None:
        self._name = name
        self._houses = houses
        self._vocabularies = vocabularies
        self._seed = seed

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        """`count` tasks with distinct texts; raises ValueError for an unknown split."""
        if split not in get_args(Split):
            raise ValueError(
                f"Unknown split {split!r}; expected one of {', '.join(get_args(Split))}."
            )
        draw = random.Random(f"tasks/{self._name}/{self._seed}/{split}/{seed}")
        requests = house.distinct_requests(draw, self._vocabularies, split)
        return [self._task(next(requests), draw) for _ in range(count)]

    def verify(self, task: Task, answer: str) -> Outcome:
        """Execute `answer` on the task's database and compare the whole database with the goal."""
        data: Mapping[str, Any] = task.data
        tenant, expected = data["tenant"], data["call"]
        services = self._vocabularies[tenant].services
        try:
            check_call(self._houses[tenant], services, data["database"], expected, answer)
        except CallError as error:
            return Outcome(passed=False, score=0.0, reason=str(error), correction=expected)
        return Outcome(
            passed=True, score=1.0, reason="the database is as requested", correction=None
        )

    def reference_answer(self, task: Task) -> str:
        return str(task.data["call"])

    def _task(self, request: Request, draw: random.Random) -> Task:
        return Task(
            id=f"{self._name}-{hashlib.sha256(request.text.encode()).hexdigest()[:12]}",
            messages=[{"role": "user", "content": request.text}],
            data={
                "tenant": request.tenant,
                "database": new_database(draw, request, house.SITES),
                "call": house.expected_call(self._houses[request.tenant], request),
            },
        )


class CompanyApi(ToolApi):
    """The work of one node of the quickstart."""

    def __init__(self, node: Node, seed: int = 0) -> None:
        if node not in NODE_VOCABULARY:
            raise ValueError(
                f"Unknown node {node!r}; expected one of {', '.join(NODE_VOCABULARY)}."
            )
        company = NODE_COMPANY[node]
        houses = {company: house.company_house(company, seed)}
        super().__init__(
            f"{company}-{node.lower()}", houses, {company: NODE_VOCABULARY[node]}, seed
        )


class PublicTenants(ToolApi):
    """The anchor: the four tenants that the base model knows by heart."""

    def __init__(self, seed: int = 0) -> None:
        houses = house.public_houses()
        super().__init__("public", houses, dict.fromkeys(houses, Vocabulary(house.SERVICES)), seed)
