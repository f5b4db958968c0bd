"""What the middleware, the plug-in and the control socket share inside one vLLM process.

In: the node's settings, vLLM's engine. Out: the alias table, the recorder, loading and pointing,
readiness. Guarantees: loads and unloads happen one at a time; the alias only ever points at a
loaded version.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from edge_node.access import Keyring, Quotas
from edge_node.capture import (
    Finished,
    Recorder,
    Redaction,
    Texts,
    load_redactor,
    reason_of,
    reason_of_episode,
    to_interaction,
)
from edge_node.disk import read_json
from edge_node.errors import NotHeld, ServingError, UnknownEpisode
from edge_node.experience import (
    ANYONE,
    Feedback,
    Interaction,
    Receipt,
    Said,
    Teller,
    interactions_of,
    open_experience,
)
from edge_node.problems import Problems
from edge_node.serving.adapters import check_adapter
from edge_node.serving.aliases import AliasTable
from edge_node.serving.counts import ServingCounts
from edge_node.serving.fingerprint import weights_digest
from edge_node.serving.first_tokens import FirstTokens
from edge_node.serving.held import Held
from edge_node.serving.in_flight import InFlight
from edge_node.serving.loading import forget_loading, note_loading
from edge_node.serving.sessions import Session, Sessions
from edge_node.serving.versions import Versions
from edge_node.settings import EdgeSettings

logger = logging.getLogger(__name__)


class EngineLike(Protocol):
    """What a Gateway needs of internals.Engine."""

    base_name: str
    max_model_len: int

    @property
    def longest_text(self) -> int: ...
    @property
    def texts(self) -> Texts: ...
    @property
    def errored(self) -> bool: ...
    async def load(self, name: str, path: Path) -> None: ...
    async def unload(self, name: str) -> None: ...
    async def held(self, name: str, path: Path) -> Held: ...
    def stop_listening(self) -> None: ...
    async def probe(self) -> None: ...
    def answer_ids(self, text: str) -> list[int] | None: ...
    def calls_ids(self, calls: list[dict[str, Any]]) -> list[int] | None: ...


class Gateway:
    """One per serving process; lives on the server's event loop."""

    def __init__(self, settings: EdgeSettings, engine: EngineLike) -> None:
        self.settings = settings
        self.engine = engine
        self.aliases = AliasTable(settings.serving.alias, engine.base_name)
        self.versions = Versions(self.aliases, settings.releases)
        self.store = open_experience(settings)
        self.redaction = Redaction(load_redactor(settings.capture.redaction), engine.texts)
        self.problems = Problems(settings.data_dir)
        self.recorder = Recorder(
            self.store,
            queue_size=settings.capture.queue_size,
            durable_timeout_s=settings.capture.durable_timeout_s,
            problems=self.problems,
            parse=self._redacted,
        )
        self.in_flight = InFlight()
        self.sessions = Sessions()
        self.keys = Keyring(settings, self.problems)
        self.quotas = Quotas(settings.serving.limits)
        self.counts = ServingCounts()
        self.draining = False
        self.last_progress = time.monotonic()
        """When the last piece of what the engine made went out."""
        self.first_tokens = FirstTokens()
        self.weights: dict[str, str] = {}
        """Served name -> digest of its weights (fingerprint.py)."""
        self._probes: list[float] = []
        """Since when each probe waits for its token."""
        self._problem: str | None = None
        self._changing = asyncio.Lock()

    def not_ready(self) -> str | None:
        """Why this node should get no traffic; None when it is ready."""
        if self.draining:
            return "The node is draining."
        if self.engine.errored:
            return "vLLM's engine has failed and is being restarted."
        if self.aliases.target is None:
            return self._problem or "No release is active yet."
        return None

    def refusal(self) -> str | None:
        """Why no request may begin now, whatever it asks for; None when one may."""
        if self.draining:
            return "The node is draining; send the request to another node."
        if self.engine.errored:
            return "vLLM's engine has ended and is started again. Send the request again later."
        return None

    async def load(self, name: str, path: Path, *, proved: bool = True) -> None:
        """Loads directory `path` as `name`; idempotent; on ServingError nothing has changed.

        `proved`: False hides a new version from clients until `expect_held`.
        """
        if not self.aliases.check_new(name, path):
            return  # a way back must not wait behind another version's load
        async with self._changing:
            if not self.aliases.check_new(name, path):
                return
            if self.settings.base.path is not None:
                await asyncio.to_thread(check_adapter, path, self.settings.base.path)
            weights = await asyncio.to_thread(weights_digest, path)
            note_loading(self.settings.data_dir, name)
            try:
                await self.engine.load(name, path)
            finally:
                if not self.engine.errored:  # else the supervisor reads what ended it
                    forget_loading(self.settings.data_dir)
            self.weights[name] = weights
            self.aliases.add(name, path, proved=proved)
            logger.info("Adapter loaded", extra={"release": name})

    async def expect_held(self, name: str) -> None:
        """Raises ServingError unless each worker holds `name` as its directory has it.

        From then on clients may name it.
        """
        path = self.aliases.loaded.get(name)
        if path is None:
            raise ServingError(f"{name} is not loaded, so nothing of it can be compared.")
        try:
            held = await self.engine.held(name, path)
        except Exception as error:  # of a worker: it may be any
            raise ServingError(f"vLLM's workers did not compare {name}: {error!r}.") from error
        if held.wrong or not held.modules:
            first = next((f"{key}: {why}" for key, why in sorted(held.wrong.items())), "none")
            raise NotHeld(
                f"vLLM loaded {name} without an error, but {len(held.wrong)} of its "
                f"{held.modules} modules are not held as the release has them; the first is {first}"
            )
        self.aliases.show(name)

    def point(self, name: str) -> None:
        """From now on the alias means `name`; requests that have arrived keep their version."""
        before = self.aliases.target
        self.aliases.point(name)
        if before != name:
            logger.info(
                "Alias points at another version", extra={"release": name, "previous": before}
            )

    async def unload(self, name: str) -> None:
        """Frees `name` when no request uses it; idempotent; ServingError for the alias's target."""
        if not self.aliases.retire(name):
            return
        try:
            # Without the lock: a long answer on an old version must not hold up the next load.
            await self.aliases.idle(name)
            async with self._changing:
                await self.engine.unload(name)
        except BaseException:
            self.aliases.reinstate(name)
            raise
        self.aliases.remove(name)
        self.weights.pop(name, None)
        logger.info("Adapter unloaded", extra={"release": name})

    def keep_feedback(self, said: Said, teller: Teller = ANYONE) -> Receipt:
        """Makes `said` durable, with a correction's token ids; slow. Raises as the store.

        A ValueError also says that this model's template does not show tool calls.
        """
        for interaction_id in interactions_of(said):
            if why := reason_of(interaction_id) or self.store.why_removed(interaction_id):
                return Receipt("", why)
        # Before the store is asked: what is stored meanwhile is found there.
        expects = self.in_flight.among(interactions_of(said), teller.user)
        said = self.redaction.said(said)
        if isinstance(said, Feedback) and said.correction is not None:
            ids = (
                self.engine.calls_ids(json.loads(said.correction))
                if said.kind == "tool_calls"
                else self.engine.answer_ids(said.correction)
            )
            said = replace(said, correction_ids=None if ids is None else tuple(ids))
        longest = self.engine.max_model_len
        teller = replace(teller, expects=expects)
        try:
            return self.store.give(said, max_tokens=longest, teller=teller)
        except UnknownEpisode as error:
            if why := reason_of_episode(self.settings.capture, error.interaction_id):
                return Receipt("", why)
            raise

    def _redacted(self, finished: Finished) -> Interaction | None:
        """What may be written of a finished answer; in the writer thread."""
        interaction = to_interaction(finished)
        return interaction and self.redaction.interaction(interaction)

    def open_session(self, model: str, **limits: Any) -> Session:
        """A session (sessions.py) on a loaded version or the base; raises ServingError."""
        if model != self.aliases.base and model not in self.aliases.loaded:
            raise ServingError(
                f"{model} is not loaded, so no session can be opened on it. Load it first; an "
                "alias will not do, as it may point elsewhere during the run."
            )
        return self.sessions.open(model, **limits)

    async def drain(self) -> None:
        """Refuses new requests and returns when the last answer has gone out.

        New connections are the supervisor's (doorway.py): vLLM drops what it has when it ends.
        """
        self.draining = True
        self.engine.stop_listening()
        await self.aliases.idle()

    async def probe(self, deadline_s: float) -> bool:
        """True when the engine makes a token, or any answer moves, within the deadline."""
        started = time.monotonic()
        self._probes.append(started)
        try:
            async with asyncio.timeout(deadline_s):
                await self.engine.probe()
            return True
        except TimeoutError:
            # The probe may wait behind a long queue. An engine that answers others does not hang.
            return self.last_progress > started
        finally:
            self._probes.remove(started)

    def silent_s(self) -> float:
        """How long a probe has waited while no answer moved; 0 when none waits."""
        since = max(min(self._probes), self.last_progress) if self._probes else None
        return 0.0 if since is None else time.monotonic() - since

    async def activate(self) -> None:
        """Loads the release of releases/active.json, also offline, and points the alias at it.

        Where the node's supervisor proves releases (edge_node/proof), it points instead.
        """
        file = self.settings.data_dir / "releases" / "active.json"
        try:
            active = read_json(file)
            name = f"{self.aliases.alias}@{active['label']}"
            path = (self.settings.data_dir / active["path"]).absolute()
            waits = self.settings.releases.proof != "off" and (file.parent / "proofs").is_dir()
            await self.load(name, path, proved=not waits)
            if waits:  # for the supervisor, which proves releases there, and points at one
                self._problem = "The active release is loaded, and is compared before it serves."
                return
            self.point(name)
        except FileNotFoundError:
            self._problem = None
        except (ServingError, OSError, ValueError, KeyError, TypeError) as error:
            self._problem = f"The active release in {file} cannot be loaded: {error}"
            logger.error("Active release not loaded", extra={"cause": str(error)})


here: Gateway | None = None
"""Of this vLLM process; None until the plug-in has made it."""
