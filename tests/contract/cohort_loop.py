"""A central without servers for tests of the loop; its nodes answer offers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from central.blobs import DirectoryBlobs
from central.cohort import offers
from central.cohort.loop import CohortLoop
from central.heads import Heads
from central.journal import (
    EvaluationRecord,
    Event,
    EventKind,
    Journal,
    NewEvent,
    ReleaseRecord,
    State,
)
from central.releases import Registry
from central.settings import CentralSettings
from protos.encoding import Encoding
from protos.lora import LoraModule, LoraTensors, decode, encode
from protos.manifest import Payload
from tests.unit.central.builders import (
    AT,
    BASE,
    admitted,
    make_update,
    node_enrolled,
    token_created,
)

OUT, IN = 12, 10
NAMES = ("layers.0.q", "layers.0.v")
KEY = ec.generate_private_key(ec.SECP256R1())


@dataclass
class Central:
    """A central without its servers."""

    journal: Journal
    blobs: DirectoryBlobs
    registry: Registry

    def head(self, cohort: str = "shared") -> ReleaseRecord:
        with self.journal.read() as state:
            head = state.head(cohort)
        assert head is not None
        return head

    def product(self, release: ReleaseRecord, name: str) -> np.ndarray:
        tensors = decode(self.blobs.read(release.manifest.payload.digest_sha256))
        assert all(module.scale == 1.0 for module in tensors.modules.values())
        return dense(tensors, name)

    def join(self, cohort: str, *nodes: str) -> None:
        self.registry.ensure_cohort(cohort)
        self.journal.append(
            token_created(cohort, f"token-{cohort}"),
            *(node_enrolled(n, cohort, f"token-{cohort}") for n in nodes),
        )

    def admit(
        self,
        node: str,
        tensors: LoraTensors,
        cohort: str = "shared",
        sequence: int = 1,
        encoding: Encoding = "float32",
    ) -> str:
        data = encode(tensors, encoding)
        payload = Payload(digest_sha256=self.blobs.put(data), size_bytes=len(data))
        update = make_update(
            self.head(cohort).manifest, node, sequence, payload=payload, encoding=encoding
        )
        self.journal.append(admitted(update, cohort))
        return update.digest


@contextmanager
def opened(root: Path, builds_on: Mapping[str, str] = MappingProxyType({})) -> Iterator[Central]:
    """A central's stores under `root`; loops over them notice soon that they must stop."""
    blobs = DirectoryBlobs(root / "blobs")
    journal = Journal(
        f"sqlite:///{root}/journal.db", clock=lambda: AT, seals=Heads(root, blobs, KEY)
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(offers, "STOP_CHECK_S", 0.02)
            yield Central(journal, blobs, Registry(journal, blobs, KEY, BASE, builds_on))
    finally:
        journal.close()


def dense(tensors: LoraTensors, name: str) -> np.ndarray:
    if name not in tensors.modules:
        return np.zeros((OUT, IN))
    module = tensors.modules[name]
    return module.scale * (module.B.astype(np.float64) @ module.A.astype(np.float64))


def make_increment(
    seed: int, rank: int = 3, scale: float = 2.0, names: tuple[str, ...] = NAMES
) -> LoraTensors:
    rng = np.random.default_rng(seed)
    return LoraTensors(
        {
            n: LoraModule(
                rng.standard_normal((rank, IN), np.float32),
                rng.standard_normal((OUT, rank), np.float32),
                scale,
            )
            for n in names
        }
    )


def make_settings(quorum: int = 0, **merge: object) -> CentralSettings:
    gate = {"quorum": quorum, "deadline_s": 60, "tasks": 20, "max_tasks": 20}
    return CentralSettings(merge={"min_updates": 2, "rank": 8, **merge}, gate=gate)  # type: ignore[arg-type]


def make_loop(
    central: Central,
    settings: CentralSettings,
    cohort: str = "shared",
    clock: Callable[[], str] = lambda: AT,
    is_connected: Callable[[str], bool] = lambda node: True,
    stop: threading.Event | None = None,
) -> CohortLoop:
    """The cohort's loop on the grid of a running central."""
    journal, stop = central.journal, stop or threading.Event()
    grid = offers.JournalGrid(cohort, journal, stop, is_connected, clock)
    return CohortLoop(cohort, journal, central.registry, central.blobs, settings, grid)


def take_steps(
    central: Central,
    settings: CentralSettings,
    until: Callable[[], bool],
    cohort: str = "shared",
    clock: Callable[[], str] = lambda: AT,
    is_connected: Callable[[str], bool] = lambda node: True,
) -> None:
    """The loop in this thread; `until` is asked before every step."""
    loop = make_loop(central, settings, cohort, clock, is_connected)
    for _ in range(10):
        if until():
            return
        loop.step()
    raise AssertionError("not reached after ten steps")


def result(
    environment: str, both: int = 10, b: int = 0, c: int = 5, neither: int = 5
) -> dict[str, object]:
    return {
        "environment": environment,
        "tasks_digest": "0" * 64,
        "anchor": False,
        "both_passed": both,
        "only_reference_passed": b,
        "only_candidate_passed": c,
        "neither_passed": neither,
    }


Reply = tuple[list[dict[str, object]], str]
"""Results, or none and why."""


def answering(
    journal: Journal, answer: Callable[[str], Reply | None]
) -> AbstractContextManager[None]:
    """Nodes that answer every evaluation offer with `answer(node_id)`; None stays silent."""
    return answering_offers(journal, lambda offer, node: answer(node))


@contextmanager
def answering_offers(
    journal: Journal, answer: Callable[[EvaluationRecord, str], Reply | None]
) -> Iterator[None]:
    """The same, by what is asked; offers of a decided candidate get no answer."""
    done = threading.Event()

    def pending(state: State) -> NewEvent | bool | None:
        for offer in state.evaluations.values():
            for node in offer.nodes if state.releases[offer.candidate].state == "candidate" else ():
                if node not in offer.reports and (reply := answer(offer, node)) is not None:
                    body = {"node_id": node, "results": reply[0], "abstain_reason": reply[1]}
                    return NewEvent(
                        EventKind.EVALUATION_REPORTED, offer.cohort, offer.offer_id, body
                    )
        return done.is_set() or None

    def work() -> None:
        while isinstance(event := journal.wait(pending), NewEvent):
            journal.append(event)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        journal.wake()
        thread.join()


class _Killed(Exception):
    """Stands for kill -9."""


@dataclass
class Crash:
    """Whether it came to the crash that was asked for."""

    happened: bool = False


@contextmanager
def crashing_at(central: Central, append_step: int | None) -> Iterator[Crash]:
    """End the block as `kill -9` would: before (even) or after (odd) append `append_step // 2`.

    Only appends of this thread count.
    """
    append, loop_thread, count = central.journal.append, threading.current_thread(), 0

    def crashing(*events: NewEvent) -> list[Event]:
        nonlocal count
        if threading.current_thread() is not loop_thread:
            return append(*events)
        count += 1
        if append_step == 2 * (count - 1):
            raise _Killed
        recorded = append(*events)
        if append_step == 2 * (count - 1) + 1:
            raise _Killed
        return recorded

    central.journal.append = crashing  # type: ignore[method-assign]
    crash = Crash()
    try:
        yield crash
    except _Killed:
        crash.happened = True
