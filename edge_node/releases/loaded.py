"""The releases in vLLM, and the one that the alias points at.

In: signed manifests, what is kept on disk. Out: versions on disk and in vLLM, proved before the
alias points at them. Guarantees: two that want the same release wait for each other; a vLLM that
starts meanwhile serves what the alias will.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakValueDictionary

import grpc

from edge_node.errors import AdapterError, Damaged, NotProved, ServingError, StorageError
from edge_node.figures.tally import TALLY
from edge_node.releases.download import fetch_release
from edge_node.releases.probation import Probation
from edge_node.releases.store import ReleaseStore, StoredRelease
from edge_node.serving import ControlClient
from edge_node.settings import EdgeSettings
from protos.releases.v1 import releases_pb2

log = logging.getLogger(__name__)


class Proves(Protocol):
    """What the watcher needs of edge_node/proof: each raises NotProved."""

    async def load(self, name: str, release: StoredRelease) -> None: ...
    async def expect(
        self, name: str, release: StoredRelease, before: StoredRelease | None, *, made: bool = True
    ) -> None: ...
    def prepare(self, release: StoredRelease, before: StoredRelease | None) -> None: ...
    async def aclose(self) -> None: ...


class LoadedReleases:
    """Of one supervisor."""

    def __init__(
        self,
        settings: EdgeSettings,
        channel: grpc.aio.Channel,
        store: ReleaseStore,
        control: ControlClient,
        probation: Probation,
        proof: Proves | None,
    ) -> None:
        self._settings = settings
        self._channel = channel
        self._store = store
        self._control = control
        self._probation = probation
        self._proof = proof
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.generation = 0
        """Start number of the vLLM that has them; 0: none yet."""
        self.pointed = ""
        """Id of the release that its alias points at; empty: none."""
        self._proved: set[str] = set()
        """Ids of those that were proved in this vLLM, and loaded since."""

    def served(self, generation: int) -> str:
        """Id of the release that the alias of this vLLM points at; empty: not yet."""
        return self.pointed if self.generation == generation else ""

    def name_of(self, release: StoredRelease) -> str:
        """The exact version's model name."""
        return f"{self._settings.serving.alias}@{release.label}"

    async def point(self, release: StoredRelease) -> None:
        """The alias points at a loaded release from now on."""
        # Named first, pointed second: a vLLM that starts in between serves what the alias will.
        await asyncio.to_thread(self._store.activate, release)
        try:
            await self._control.point(self.name_of(release))
        except ServingError:
            self._proved.discard(release.release_id)
            raise
        self.pointed = release.release_id

    async def unload(self, release: StoredRelease) -> None:
        """vLLM forgets the release when no request uses it; raises ServingError."""
        self._proved.discard(release.release_id)
        await self._control.unload(self.name_of(release))

    async def obtain(self, signed: releases_pb2.SignedManifest) -> StoredRelease:
        """The release on disk and in vLLM.

        Head and evaluation may want the same one at once: one after the other.
        """
        manifest = self._store.check(signed)
        if (why := self._probation.why_avoided(manifest.digest)) is not None:
            raise AdapterError(why)
        rank = min(manifest.rank, self._settings.releases.max_rank or manifest.rank)
        most = self._settings.serving.max_lora_rank
        if rank > most:
            raise AdapterError(
                f"Release {manifest.label} has rank {rank}; this node accepts at most {most}. "
                "Raise EDGE_SERVING__MAX_LORA_RANK, or set EDGE_RELEASES__MAX_RANK to serve its "
                "first pairs, and restart the node."
            )
        async with self.lock(manifest.digest):
            release = await fetch_release(
                self._channel, self._store, signed, self._settings.central.call_timeout_s
            )
            try:
                await self._load(release)
            except Damaged:  # central is there: the next try downloads it
                await asyncio.to_thread(self._store.remove, release)
                raise
            if self._proof is not None:
                self._proof.prepare(release, self._store.get(self.pointed))
        return release

    async def obtain_proved(self, signed: releases_pb2.SignedManifest) -> StoredRelease:
        """As `obtain`, and vLLM serves it; raises NotProved, and the alias stays where it is."""
        release = await self.obtain(signed)
        await self._expect_proof(release)
        return release

    async def _load(self, release: StoredRelease) -> None:
        """Into vLLM. What this vLLM has proved is not compared again.

        Comparing takes as long as the weights are large, and canaries stand behind users' requests;
        the way back must not wait for either.
        """
        if release.release_id in self._proved:
            # Hidden where it was not there any more: then the alias cannot point at it.
            await self._control.load(self.name_of(release), release.path, proved=False)
        elif self._proof is None:
            await self._control.load(self.name_of(release), release.path)
        else:
            with _counted():
                await self._proof.load(self.name_of(release), release)

    async def _expect_proof(self, release: StoredRelease, *, made: bool = True) -> None:
        """Raises NotProved unless vLLM serves the loaded `release`: the alias stays where it is."""
        if self._proof is not None and release.release_id not in self._proved:
            generation = self.generation
            before = self._store.get(self.pointed) if self.pointed else None
            with _counted():
                await self._proof.expect(self.name_of(release), release, before, made=made)
            TALLY.proved("passed")
            if generation == self.generation:
                self._proved.add(release.release_id)

    async def obtain_name(self, signed: releases_pb2.SignedManifest) -> str:
        return self.name_of(await self.obtain(signed))

    async def load_kept(self, generation: int, *, damage_matters: bool) -> None:
        """Loads what is kept into a new vLLM, whose alias points at the active release then.

        Where vLLM does not serve it, the newest kept release that it serves takes its place. The
        generation counts as loaded when the alias points somewhere, or there is no release.
        """
        self.pointed = await self._load_kept(generation, damage_matters=damage_matters)

    async def _load_kept(self, generation: int, *, damage_matters: bool) -> str:
        """Id of the release that the alias points at now; empty without one."""
        active, failed, wanted = None, None, ""
        self._proved.clear()
        try:
            active = self._store.active()
            if active is not None:
                wanted = active.release_id
                await self._take_up(active)
        except (ServingError, StorageError, NotProved) as error:
            failed = error
            if damage_matters and not isinstance(error, NotProved):
                raise
            log.warning(
                "active release not loaded; another takes its place", extra={"why": str(error)}
            )
            active = None
        for release in self._store.newest()[: self._settings.releases.keep]:
            if self._probation.why_avoided(release.release_id) is not None:
                continue
            try:
                await self._load(release)
                if active is None and isinstance(failed, NotProved):
                    await self._take_up(release)
                    await asyncio.to_thread(self._store.activate, release)
                    self._probation.not_served(wanted)
                    active = release
            # An old version must not keep the node from the new one.
            except (ServingError, NotProved) as error:
                log.warning(
                    "kept release not loaded", extra={"release": release.label, "why": str(error)}
                )
        if active is None and failed is not None:
            if damage_matters:
                raise failed
            return ""  # the head may take its place; if it cannot, this is tried again
        self.generation = generation
        return active.release_id if active else ""

    async def _take_up(self, release: StoredRelease) -> None:
        """Points the alias at a kept release, when vLLM serves it."""
        await self._load(release)
        await self._expect_proof(release, made=False)
        await self._control.point(self.name_of(release))

    def lock(self, release_id: str) -> asyncio.Lock:
        return self._locks.setdefault(release_id, asyncio.Lock())


@contextmanager
def _counted() -> Iterator[None]:
    """A proof that fails is in the node's figures."""
    try:
        yield
    except NotProved:
        TALLY.proved("failed")
        raise
