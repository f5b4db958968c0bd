"""The node's own newest adapter: kept here, served where a policy says so, and never sent.

In: what a round left that its local gate found better than its start (learning/own.py). Out: one
more version in vLLM, which is the alias's own adapter while the alias points at that start. As soon
as the alias points at another release it answers nobody: what it was better than is not served any
more, and the new release may hold it. Its directory goes when a later round leaves another one. The
room `own-adapter` has what fails.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from edge_node.disk import read_json, write_file
from edge_node.errors import NotHeld, ServingError
from edge_node.problems import Problems
from edge_node.releases.trouble import RETRY_LAST_S, next_step, words
from edge_node.serving import ControlClient
from edge_node.settings import EdgeSettings
from lorikeet.pauses import doubling

log = logging.getLogger(__name__)

LOOK_PERIOD_S = 1.0
WRITING_S = 60.0
"""Longer than a learner needs between a directory and its record."""
ROOM = "own-adapter"


class Own(BaseModel):
    """An adapter of release and increment, and what the local gate saw of it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    round_id: str
    start_release: str
    """Id of the release that it is built on."""
    path: Path
    """PEFT directory."""
    tasks: float
    start: float
    """Mean score of the release on the held-out tasks."""
    policy: float
    """That of the adapter."""

    @property
    def label(self) -> str:
        return f"own-{self.round_id}"


def own_folder(data_dir: Path) -> Path:
    return data_dir.absolute() / "learning" / "own"


def read_own(data_dir: Path) -> Own | None:
    """The newest one; None without one. A damaged record counts as none."""
    try:
        return Own.model_validate(read_json(own_folder(data_dir) / "own.json"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        log.warning("own adapter's record not read", extra={"why": type(error).__name__})
        return None


def write_own(data_dir: Path, own: Own) -> None:
    """From now on this is the newest one; raises StorageError."""
    write_file(own_folder(data_dir) / "own.json", json.dumps(own.model_dump(mode="json")).encode())


class OwnAdapter:
    """Long-lived: `run` until cancelled."""

    def __init__(
        self,
        settings: EdgeSettings,
        control: ControlClient,
        vllm_ready: Callable[[], Awaitable[int]],
        pointed: Callable[[int], str],
    ) -> None:
        """`pointed`: id of the release that the alias of vLLM number so and so points at."""
        self._settings = settings
        self._control = control
        self._vllm_ready = vllm_ready
        self._pointed = pointed
        self._problems = Problems(settings.data_dir)
        self._generation = 0
        self._served = ""
        """Its name in vLLM; empty: none is loaded."""
        self._tried = ""
        """The one whose load began last in this vLLM."""
        self._ends: dict[str, int] = {}
        """How many vLLM ended with it."""

    async def run(self) -> None:
        pauses = doubling(LOOK_PERIOD_S, RETRY_LAST_S)
        while True:
            generation = await self._vllm_ready()
            pointed = self._pointed(generation)
            if not pointed or await self._follow(pointed, generation):
                pauses = doubling(LOOK_PERIOD_S, RETRY_LAST_S)
            await asyncio.sleep(next(pauses))

    async def _follow(self, pointed: str, generation: int) -> bool:
        """False: it failed, and is tried again after a while."""
        own = await asyncio.to_thread(read_own, self._settings.data_dir)
        name = f"{self._settings.serving.alias}@{own.label}" if own else ""
        if generation != self._generation:  # another vLLM, which has none
            if own and name in (self._served, self._tried):
                self._ends[name] = self._ends.get(name, 0) + 1
            self._generation, self._served, self._tried = generation, "", ""
        try:
            if own is not None and self._ends.get(name, 0) >= self._settings.releases.crashes:
                self._problems.report(
                    ROOM,
                    f"vLLM ended {self._ends[name]} times with this node's own adapter of round "
                    f"{own.round_id}, so releases alone answer until a later round.",
                    "See logs/vllm.log.1 in EDGE_DATA_DIR.",
                )
                own = None
            elif own is not None and own.start_release == pointed:
                await self._serve(own, name)
                return True
            await self._leave()
            await asyncio.to_thread(self._clean, own.path if own else None)
        except Exception as error:  # supervision: the release answers
            text = f"This node's own adapter answers nobody: {words(error)}"
            self._problems.report(ROOM, text, next_step(error))
            return False
        return True

    async def _serve(self, own: Own, name: str) -> None:
        # Where the alias moved away and back, vLLM has it, and nobody gets it.
        if self._served == name and (await self._control.state()).own == name:
            return
        old = self._served if self._served != name else ""
        self._tried = name  # a load may be what ends vLLM
        await self._load(own, name)
        await self._control.own(name)
        self._served = name
        self._problems.clear(ROOM)
        log.info("own adapter answers", extra={"round_id": own.round_id, "score": own.policy})
        if old:
            await self._control.unload(old)
        await asyncio.to_thread(self._clean, own.path)

    async def _load(self, own: Own, name: str) -> None:
        """Into vLLM, and known to clients once its workers hold it as its directory has it."""
        if self._settings.releases.proof == "off":
            await self._control.load(name, own.path)
            return
        await self._control.load(name, own.path, proved=False)
        try:
            await self._control.expect_held(name)
        except NotHeld:
            await self._control.unload(name)
            raise

    async def _leave(self) -> None:
        if self._served:
            await self._control.own(None)
            await self._control.unload(self._served)  # when its last answer has gone out
            log.info("own adapter is gone", extra={"model": self._served})
            self._served = ""

    def _clean(self, kept: Path | None) -> None:
        """Deletes what vLLM has forgotten. A learner may be writing what no record names yet."""
        for folder in own_folder(self._settings.data_dir).glob("*/"):
            with suppress(OSError):
                if folder != kept and time.time() - folder.stat().st_mtime > WRITING_S:
                    shutil.rmtree(folder)


def expect_rank(rank: int, most: int) -> None:
    """Raises ServingError for an adapter that vLLM would refuse."""
    if rank > most:
        raise ServingError(
            f"Release and increment have rank {rank} together; this node serves adapters up to "
            f"rank {most}. Raise EDGE_SERVING__MAX_LORA_RANK, or lower EDGE_LEARNING__RANK."
        )
