"""What the middleware, the plug-in and the control socket share inside one vLLM process.

In: the node's settings, vLLM's engine. Out: the alias table, the recorder, loading and pointing,
readiness. Guarantees: loads and unloads happen one at a time; the alias only ever points at a
loaded version.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from edge_node.access import Keyring, Quotas
from edge_node.capture import Recorder
from edge_node.disk import read_json
from edge_node.errors import ServingError
from edge_node.experience import ExperienceStore, Feedback, Preference, Receipt, Scores
from edge_node.problems import Problems
from edge_node.serving.adapters import check_adapter
from edge_node.serving.aliases import AliasTable
from edge_node.serving.first_tokens import FirstTokens
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
    def errored(self) -> bool: ...
    async def load(self, name: str, path: Path) -> None: ...
    async def unload(self, name: str) -> None: ...
    def stop_listening(self) -> None: ...
    async def probe(self) -> None: ...
    def answer_ids(self, text: str) -> list[int] | None: ...


class Gateway:
    """One per serving process; lives on the server's event loop."""

    def __init__(self, settings: EdgeSettings, engine: EngineLike) -> None:
        self.settings = settings
        self.engine = engine
        self.aliases = AliasTable(settings.serving.alias, engine.base_name)
        self.versions = Versions(self.aliases, settings.releases)
        self.store = ExperienceStore(settings.data_dir / "experience.db")
        self.problems = Problems(settings.data_dir)
        self.recorder = Recorder(
            self.store,
            queue_size=settings.capture.queue_size,
            durable_timeout_s=settings.capture.durable_timeout_s,
            problems=self.problems,
        )
        self.sessions = Sessions()
        self.keys = Keyring(settings, self.problems)
        self.quotas = Quotas(settings.serving.limits)
        self.draining = False
        self.last_progress = time.monotonic()
        """When the last piece of an answer went out."""
        self.first_tokens = FirstTokens()
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

    async def load(self, name: str, path: Path) -> None:
        """Loads directory `path` as `name`; idempotent; on ServingError nothing has changed."""
        if not self.aliases.check_new(name, path):
            return  # a way back must not wait behind another version's load
        async with self._changing:
            if not self.aliases.check_new(name, path):
                return
            if self.settings.base.path is not None:
                await asyncio.to_thread(check_adapter, path, self.settings.base.path)
            note_loading(self.settings.data_dir, name)
            try:
                await self.engine.load(name, path)
            finally:
                if not self.engine.errored:  # else the supervisor reads what ended it
                    forget_loading(self.settings.data_dir)
            self.aliases.add(name, path)
            logger.info("Adapter loaded", extra={"release": name})

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
        logger.info("Adapter unloaded", extra={"release": name})

    def keep_feedback(
        self, feedback: Feedback | Preference | Scores, user: str | None = None
    ) -> Receipt:
        """Makes `feedback` durable, with a correction's token ids; slow. Raises as the store.

        user: of an access key that may judge the answers to that user alone.
        """
        if user is not None:
            for interaction_id in interactions_of(feedback):
                self.store.expect_asked_by(user, interaction_id)
        longest = self.engine.max_model_len
        if isinstance(feedback, Preference):
            return self.store.add_preference(feedback, max_tokens=longest)
        if isinstance(feedback, Scores):
            return self.store.add_scores(feedback, max_tokens=longest)
        if feedback.correction is not None:
            ids = self.engine.answer_ids(feedback.correction)
            feedback = replace(feedback, correction_ids=None if ids is None else tuple(ids))
        return self.store.add_feedback(feedback, max_tokens=longest)

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
        """Loads the release of releases/active.json and points the alias at it, also offline."""
        file = self.settings.data_dir / "releases" / "active.json"
        try:
            active = read_json(file)
            name = f"{self.aliases.alias}@{active['label']}"
            await self.load(name, (self.settings.data_dir / active["path"]).absolute())
            self.point(name)
        except FileNotFoundError:
            self._problem = None
        except (ServingError, OSError, ValueError, KeyError, TypeError) as error:
            self._problem = f"The active release in {file} cannot be loaded: {error}"
            logger.error("Active release not loaded", extra={"cause": str(error)})


here: Gateway | None = None
"""Of this vLLM process; None until the plug-in has made it."""


def interactions_of(feedback: Feedback | Preference | Scores) -> list[str]:
    """Ids of the interactions that it judges: one, or the chosen one's and the rejected one's."""
    if isinstance(feedback, Preference):
        return [feedback.chosen.interaction_id, feedback.rejected.interaction_id]
    return [feedback.interaction_id]
