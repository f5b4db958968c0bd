"""Does vLLM serve the release that it loaded? Asked after every load, before the alias switches.

In: a release on disk, its served name. Out: nothing, or NotProved with what is served instead.
Three things are compared: the version directory with the payload that central signed; what vLLM's
workers hold with that directory (serving/held.py); and what vLLM answers with PEFT's reference
(distance.py). Guarantees: a version that fails is unloaded, so that the next try loads it anew;
clients cannot name a version before its weights were compared. Where no reference can be had, the
weights alone decide.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from edge_node import vllm_arguments
from edge_node.base_model import longest_context
from edge_node.errors import Damaged, NotHeld, NotProved, ServingError
from edge_node.problems import Problems
from edge_node.proof.canaries import CONNECTIONS, ask_canaries
from edge_node.proof.distance import (
    MOST_QUANTISED,
    MOST_ROUNDING,
    Distances,
    Reference,
    measure,
    wrong,
)
from edge_node.proof.reckoner import Reckoner
from edge_node.proof.references import NoReference, NoRoom, References
from edge_node.releases.store import ReleaseStore, StoredRelease
from edge_node.serving import ControlClient
from edge_node.settings import EdgeSettings
from protos.base import BaseModelInfo

log = logging.getLogger(__name__)

ROOM = "proof"
QUANTISING = frozenset({"--quantization", "-q"})
"""vLLM's arguments that quantise the base."""
AGAIN = (
    "The node tries it again. If it goes on, start the node again; then ask the operator of "
    "central to roll the release back."
)


class Reckons(Protocol):
    async def ask(self, order: Mapping[str, Any]) -> Mapping[str, Any]: ...
    async def aclose(self) -> None: ...


class Proof:
    """`load` and `expect` for each version; `aclose` ends the process that makes references."""

    def __init__(
        self,
        data_dir: Path,
        store: ReleaseStore,
        control: ControlClient,
        references: References | None,
        reckoner: Reckons | None,
        most_rounding: float = MOST_ROUNDING,
    ) -> None:
        """`references`: None compares weights alone.

        The folder that it makes tells vLLM to leave the pointing to the supervisor at a start.
        """
        self._store = store
        self._control = control
        self._references = references
        self._reckoner = reckoner
        self._most_rounding = most_rounding
        self._problems = Problems(data_dir)
        self._has_no_room = False
        with suppress(OSError):  # a full disk must not keep a node from serving
            (data_dir / "releases" / "proofs").mkdir(parents=True, exist_ok=True)
        self._preparing: set[asyncio.Task[None]] = set()
        self.last: Distances | None = None
        """Of the last release that was compared with a reference."""

    async def load(self, name: str, release: StoredRelease) -> None:
        """Loads the release, hidden from clients until its weights were compared.

        Raises NotProved, ServingError; Damaged for a directory that is not what central signed.
        """
        different = await asyncio.to_thread(self._store.differs, release)
        if different:
            await self._put_away(name, release)
            raise Damaged(
                f"Release {release.label} is damaged on disk: {different} is not what central "
                "signed. It is downloaded again as soon as central names it: check "
                "EDGE_CENTRAL__ADDRESS."
            )
        await self._control.load(name, release.path, proved=False)
        try:
            await self._control.expect_held(name)
        except NotHeld as error:
            await self._put_away(name, release)
            raise NotProved(f"Release {release.label} is not served: {error}. {AGAIN}") from error

    async def expect(
        self, name: str, release: StoredRelease, before: StoredRelease | None, *, made: bool = True
    ) -> None:
        """Compares what vLLM answers as `name`, which was loaded, with the reference.

        `before`: what the alias points at. `made`: False takes a reference only where it is there
        already. Raises NotProved, ServingError.
        """
        if self._references is None:
            return
        began = time.monotonic()
        reference = await self._reference(release, before, made)
        if reference is None:
            return
        waited_s = time.monotonic() - began
        state = await self._control.state()
        target = state.target if state.target not in (None, name, state.base) else None
        async with self._control.requests(CONNECTIONS) as client:
            served = await ask_canaries(client, reference, name, state.base, target)
        self.last = distances = measure(reference, served)
        if (mistake := wrong(distances, self._most_rounding)) is not None:
            await self._put_away(name, release)
            raise NotProved(f"vLLM does not serve release {release.label}: {mistake}. {AGAIN}")
        self._problems.clear(ROOM)
        log.info(
            "release proved",
            extra={
                "release": release.label,
                "by": "answers and weights" if distances.tells else "weights",
                "to_release": round(distances.to_release, 5),
                "shares": [round(share.value, 3) for share in distances.shares],
                "reference_s": round(waited_s, 3),
                "answers_s": round(time.monotonic() - began - waited_s, 3),
            },
        )

    def prepare(self, release: StoredRelease, before: StoredRelease | None) -> None:
        """Makes the reference meanwhile, so that a switch need not wait for it.

        One at a time: a switch to another release would wait for all of them.
        """
        if self._references is not None and not self._preparing:
            task = asyncio.create_task(self._prepare(release, before))
            self._preparing.add(task)
            task.add_done_callback(self._preparing.discard)

    async def aclose(self) -> None:
        for task in self._preparing:
            task.cancel()
        if self._reckoner is not None:
            await self._reckoner.aclose()

    async def _prepare(self, release: StoredRelease, before: StoredRelease | None) -> None:
        try:
            await self._reference(release, before, True)
        except Exception as error:  # nobody waits for it: the switch says what is wrong
            log.warning("reference not prepared", extra={"why": type(error).__name__})

    async def _reference(
        self, release: StoredRelease, before: StoredRelease | None, made: bool
    ) -> Reference | None:
        assert self._references is not None
        try:
            if not made:
                return await asyncio.to_thread(self._references.kept, release)
            reference = await self._references.of(release, before)
        except NoRoom as error:
            if not self._has_no_room:
                log.info("releases are compared by their weights alone", extra={"why": str(error)})
            self._has_no_room = True
            return None
        except NoReference as error:
            self._problems.report(
                ROOM,
                f"Release {release.label} was compared by its weights alone, because {error}.",
                "It is tried again at the next release. EDGE_RELEASES__PROOF=checksums accepts it.",
            )
            return None
        return reference

    async def _put_away(self, name: str, release: StoredRelease) -> None:
        try:
            await self._control.unload(name)
        except (ServingError, OSError) as error:  # the alias points at it already
            log.warning(
                "version that failed its proof stays loaded",
                extra={"release": release.label, "why": str(error)},
            )


def make_proof(
    settings: EdgeSettings, base: BaseModelInfo, store: ReleaseStore, control: ControlClient
) -> Proof | None:
    """As EDGE_RELEASES__PROOF says; None for off."""
    if settings.releases.proof == "off":
        return None
    if settings.releases.proof == "checksums":
        return Proof(settings.data_dir, store, control, None, None)
    reckoner = Reckoner()
    context = longest_context(settings, base.path)
    references = References(settings.data_dir, base, reckoner, context)
    plain = QUANTISING.isdisjoint(vllm_arguments.names(settings.serving.extra_args))
    most = MOST_ROUNDING if plain else MOST_QUANTISED
    return Proof(settings.data_dir, store, control, references, reckoner, most)
