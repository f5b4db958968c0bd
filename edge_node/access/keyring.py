"""The keys that a serving process lets in now.

In: the keys file, read anew every POLL_S. Out: the key that a client sent, or None; whether one is
required. Guarantees: a new or revoked key counts within 2 s; a damaged file never opens the door,
because the keys of the last good one stay. What keeps clients out is the problem of room `access`.
"""

from __future__ import annotations

import hmac
import logging
import threading

from edge_node.access.keys import Key, digest, keys_file, read_keys
from edge_node.errors import SettingsError, StorageError
from edge_node.problems import Problems
from edge_node.settings import EdgeSettings

logger = logging.getLogger(__name__)

POLL_S = 0.5
MAKE_ONE = "Make one with `edge-node keys create NAME`; it counts within 2 s."


class Keyring:
    """Made once per serving process; `watch` keeps it up to date until `close`."""

    def __init__(self, settings: EdgeSettings, problems: Problems) -> None:
        self._serving = settings.serving
        self._path = keys_file(settings)
        self._problems = problems
        self._keys: tuple[Key, ...] = ()
        self._valid: tuple[Key, ...] = ()
        self._damage: str | None = None
        """Why the file cannot be used; None when it can."""
        self._told: tuple[str, str] | None = ("", "")
        """The problem that was reported last; None: that there is none."""
        self._closing = threading.Event()
        self.refresh()

    @property
    def required(self) -> bool:
        """Does a request need a key?"""
        if self._serving.access != "auto":
            return self._serving.access == "required"
        named = self._serving.keys_file is not None
        return bool(not self._serving.is_on_loopback or named or self._keys or self._damage)

    def find(self, key: bytes) -> Key | None:
        """The record of a valid key. Its time does not depend on how much of `key` is right."""
        sent, found = digest(key), None
        for known in self._valid:
            if hmac.compare_digest(known.sha256, sent):
                found = known
        return found

    def watch(self) -> None:
        """Refreshes in a thread of its own: neither a busy loop nor a slow disk holds it up."""
        threading.Thread(target=self._watch, name="lorikeet-keys", daemon=True).start()

    def close(self) -> None:
        """Ends `watch`; idempotent."""
        self._closing.set()

    def refresh(self) -> None:
        """Reads the file, and says what is wrong with it; raises nothing."""
        try:
            self._take(read_keys(self._path))
        except FileNotFoundError:
            expected = self._keys or self._damage or self._serving.keys_file
            self._damage = f"{self._path} is not there." if expected else None
        except StorageError as error:
            self._damage = str(error)
        if (trouble := self._trouble()) != self._told:
            self._told = trouble
            if trouble is None:
                self._problems.clear("access")
            else:
                self._problems.report("access", *trouble)

    def _take(self, keys: tuple[Key, ...]) -> None:
        if keys != self._keys:
            # In this order: `required` must not be false at any moment while keys are there.
            self._keys = keys
            self._valid = tuple(key for key in keys if key.revoked is None)
            extra = {"valid": len(self._valid), "all": len(keys)}
            logger.info("Access keys were read", extra=extra)
        self._damage = None

    def _trouble(self) -> tuple[str, str] | None:
        """What keeps clients out, and what to do; None when nothing does."""
        if self._serving.access == "open":
            return None
        if self._damage is not None:
            stay = (
                f"The {len(self._valid)} keys that were read before stay valid."
                if self._valid
                else "Every request gets 401."
            )
            return f"{self._damage} {stay}", f"Mend {self._path}. {MAKE_ONE}"
        if self.required and not self._valid:
            return f"{self._path} holds no valid key, so every request gets 401.", MAKE_ONE
        return None

    def _watch(self) -> None:
        while not self._closing.wait(POLL_S):
            self.refresh()


def describe_access(settings: EdgeSettings) -> str:
    """Who may use the endpoint, for `doctor`; raises SettingsError and StorageError.

    A node whose clients would all get 401 is a mistake here.
    """
    serving, path = settings.serving, keys_file(settings)
    if serving.access == "open":
        who = f"who reaches {serving.host}" if serving.is_open_to_others else "from this machine"
        return f"open: everybody {who} may ask and teach this node (EDGE_SERVING__ACCESS=open)"
    try:
        keys = read_keys(path)
    except FileNotFoundError:
        keys = ()
    if valid := sum(key.revoked is None for key in keys):
        return f"a key is required; {valid} of {len(keys)} in {path} are valid"
    default = serving.access == "auto" and serving.keys_file is None
    if default and serving.is_on_loopback and not keys:
        return "open to this machine until `edge-node keys create` has made the first key"
    raise SettingsError(
        f"a key is required, and {path} holds no valid one: every request gets 401. {MAKE_ONE}"
    )
