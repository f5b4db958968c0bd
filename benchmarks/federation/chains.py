"""Chains of releases: who trains, how increments travel, how they are merged.

In: the quickstart's problem without servers (benchmarks.rules.world), a chain. Out: success by
round, bytes and errors. Real are the node's training, the codec and central's merge. Increments and
figures are kept in a folder under what they depend on, so a run that was stopped goes on, and
chains share what they have in common: the first round. A process of a pool finds `run_from` and
`before` here: it cannot import a package's `__main__`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from benchmarks.rules.__main__ import Rule, factor_mean, product_mean
from benchmarks.rules.world import World
from edge_node.disk import write_file
from protos.encoding import Encoding
from protos.lora import LoraTensors, decode, encode, relative_error
from protos.manifest import canonical_json, sha256_hex

ROUNDS = (1, 2, 3, 5, 8)
"""Merges after which success is measured."""
SLOW = 4
"""Merges that a round of the slow node takes."""
Success = Mapping[str, float]
"""Percent of held-out tasks by environment: A, B, C, base."""


@dataclass(frozen=True)
class Learner:
    """nodes: whose work it learns. takes: merges that a round takes. rank: None is the recipe's."""

    nodes: str
    takes: int = 1
    rank: int | None = None


BOTH = (Learner("A"), Learner("B"))


@dataclass(frozen=True)
class Chain:
    """One federation, or one learner whose releases hold only its own increments."""

    learners: Sequence[Learner] = BOTH
    rule: Rule = product_mean
    encoding: Encoding = "float32"
    released: Encoding = "float32"
    rounds: Sequence[int] = ROUNDS
    once: bool = False
    """Of the first seed only: a round costs several seconds of a core."""


DEFAULT: Encoding = "bf16"
CHAINS: Mapping[str, Chain] = {
    "centralised": Chain((Learner("AB"),)),
    "default": Chain(encoding=DEFAULT),
    "product-mean": Chain(),
    "step-2": Chain(
        rule=partial(product_mean, server_step=2.0),
        encoding=DEFAULT,
        rounds=ROUNDS[:-1],
        once=True,
    ),
    "int8-both": Chain(encoding="int8", released="int8", rounds=ROUNDS[:-1], once=True),
    "factor-mean": Chain(rule=factor_mean),
    "ranks": Chain(
        (Learner("A", rank=4), Learner("B", rank=16)),
        encoding=DEFAULT,
        rounds=ROUNDS[:-1],
        once=True,
    ),
    "slow": Chain(
        (Learner("A"), Learner("B", takes=SLOW)),
        encoding=DEFAULT,
        rounds=(SLOW, 2 * SLOW, 3 * SLOW),
        once=True,
    ),
    "local-A": Chain((Learner("A"),)),
    "local-B": Chain((Learner("B"),)),
}
"""The most important first. centralised has batches of twice the size, so it sees as many samples
as two nodes.
"""


def run(world: World, name: str, rounds: Sequence[int], folder: Path) -> dict[str, Any]:
    """Success after each of `rounds`; bytes up (each increment), their errors, bytes down."""
    chain, kept = CHAINS[name], Kept(world, folder)
    releases, success = [LoraTensors()], {}
    up, errors, down = [], [], []
    for number in range(1, max(rounds) + 1):
        new = []
        for learner in chain.learners:
            if number % learner.takes:
                continue
            trained = kept.increment(learner, number, releases[number - learner.takes])
            data = encode(trained, chain.encoding)
            new.append(decode(data))
            up.append(len(data))
            errors.append(relative_error(new[-1], trained))
        data = encode(chain.rule(releases[-1], new).tensors, chain.released)
        releases.append(decode(data))
        down.append(len(data))
        if number in rounds:
            success[str(number)] = kept.success(releases[-1])
            print(f"seed {world.seed} {name} {number}: {success[str(number)]}", file=sys.stderr)
    return {"success": success, "up": up, "errors": errors, "down": down}


def run_from(
    base: Path, seed: int, tasks: int, folder: Path, name: str, rounds: Sequence[int]
) -> dict[str, Any]:
    """`run` in the world of a base and a seed, with so many held-out tasks an environment."""
    return run(world_of(base, seed, tasks), name, rounds, folder)


def before(base: Path, seed: int, tasks: int, folder: Path) -> Success:
    """Success of the base itself."""
    return Kept(world_of(base, seed, tasks), folder).success(LoraTensors())


@lru_cache
def world_of(base: Path, seed: int, tasks: int) -> World:
    """One per process and seed."""
    return World(base, seed, tasks)


class Kept:
    """What was trained and measured before, by what it depends on."""

    def __init__(self, world: World, folder: Path) -> None:
        self._world, self._folder = world, folder
        folder.mkdir(parents=True, exist_ok=True)

    def increment(self, learner: Learner, number: int, start: LoraTensors) -> LoraTensors:
        """The increment that the learner sends to merge `number`, trained from `start`."""
        path = self._path("increment", [str(learner), number], start)
        if not path.exists():
            trained = self._world.train(
                learner.nodes,
                number // learner.takes,
                start,
                rank=learner.rank,
                version=number - learner.takes,
            )
            write_file(path, encode(trained))
        return decode(path.read_bytes())

    def success(self, release: LoraTensors) -> Success:
        path = self._path("success", [self._world.tasks], release)
        if not path.exists():
            write_file(path, canonical_json(self._world.success(release)))
        found: Success = json.loads(path.read_bytes())
        return found

    def _path(self, kind: str, what: Sequence[object], release: LoraTensors) -> Path:
        names = [self._world.seed, *what, sha256_hex(encode(release))]
        return self._folder / f"{kind}-{sha256_hex(canonical_json(names))[:32]}"
