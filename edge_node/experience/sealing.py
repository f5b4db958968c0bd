"""Encryption of what the experience store holds of people, on disk.

In: texts and token ids. Out: sealed bytes, and back. AES-256-GCM with a random nonce for each value
(NIST SP 800-38D; at most 2**32 values a key, which is 400 million answers). Guarantees: what was
not sealed is read as it is, so a store may hold both; a changed byte of a sealed value is an error.
A value does not know its row: who can write the file can swap two values.

The one way in and out: SQL of this room writes `seal(?)` and reads `unseal(column)`, which every
open store has as functions (`database.py`); Python calls the methods.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_node.errors import SettingsError, StorageError

MAGIC = b"lkseal1\x00"
"""A sealed value begins with it; no token ids do, since they would be above two billion."""
ID_BYTES, NONCE_BYTES = 4, 12
KEY = re.compile(r"[0-9a-fA-F]{64}")
MAKE_ONE = "Make one with `openssl rand -hex 32 > FILE && chmod 600 FILE`."


class Sealing:
    """`keys`: of 32 bytes; the first seals, all unseal. None: nothing is sealed."""

    def __init__(self, keys: Sequence[bytes] = ()) -> None:
        self._ciphers: dict[str, Any] = {key_id(key): _cipher(key) for key in keys}
        self.current = key_id(keys[0]) if keys else None
        """Id of the key that seals."""

    @property
    def known(self) -> frozenset[str]:
        """Ids of all keys."""
        return frozenset(self._ciphers)

    def seal(self, value: str | bytes | None) -> str | bytes | None:
        """The value sealed; as it is without a key, and for None."""
        if self.current is None or value is None:
            return value
        kind, data = (b"t", value.encode()) if isinstance(value, str) else (b"b", value)
        head = MAGIC + bytes.fromhex(self.current)
        nonce = os.urandom(NONCE_BYTES)
        sealed: bytes = self._ciphers[self.current].encrypt(nonce, kind + data, head)
        return head + nonce + sealed

    def unseal(self, value: str | bytes | None) -> str | bytes | None:
        """What was sealed; a value that was not is returned as it is.

        Raises StorageError for one that another key sealed, or that was changed.
        """
        if not isinstance(value, bytes) or not value.startswith(MAGIC):
            return value
        head, rest = value[: len(MAGIC) + ID_BYTES], value[len(MAGIC) + ID_BYTES :]
        cipher = self._ciphers.get(head[len(MAGIC) :].hex())
        if cipher is None:
            raise StorageError(
                f"A value in the experience store is sealed with key {head[len(MAGIC) :].hex()}, "
                "which EDGE_EXPERIENCE__KEY_FILE does not hold. Add it as a further line."
            )
        from cryptography.exceptions import InvalidTag

        try:
            plain = cipher.decrypt(rest[:NONCE_BYTES], rest[NONCE_BYTES:], head)
        except (InvalidTag, ValueError) as error:
            raise StorageError(
                "A sealed value in the experience store was changed. Put back a good experience.db."
            ) from error
        data: bytes = plain[1:]
        return data.decode() if plain[:1] == b"t" else data

    def needs_sealing(self, value: str | bytes | None) -> bool:
        """Whether the current key has not sealed the value."""
        if value is None or self.current is None:
            return False
        head = MAGIC + bytes.fromhex(self.current)
        return not (isinstance(value, bytes) and value.startswith(head))


CLEAR = Sealing()
"""Nothing is sealed."""


def key_id(key: bytes) -> str:
    """Names a key in sealed values and messages, and gives nothing of it away."""
    return hashlib.sha256(b"lorikeet experience key " + key).digest()[:ID_BYTES].hex()


def _cipher(key: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


def read_key_file(path: Path | None) -> Sealing:
    """The keys in EDGE_EXPERIENCE__KEY_FILE, the newest first; none without a path.

    Raises SettingsError, which quotes nothing of the file.
    """
    if path is None:
        return CLEAR
    try:
        text = path.read_text("ascii")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise SettingsError(
            f"EDGE_EXPERIENCE__KEY_FILE={path} cannot be read: {why}. Expected lines of 64 hex "
            f"digits. Put the file back; without it what is sealed is lost. {MAKE_ONE}"
        ) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        if not KEY.fullmatch(line):
            raise SettingsError(
                f"EDGE_EXPERIENCE__KEY_FILE={path}: key {number} has {len(line)} characters that "
                f"are not 64 hex digits. {MAKE_ONE}"
            )
    if not lines:
        raise SettingsError(f"EDGE_EXPERIENCE__KEY_FILE={path} holds no key. {MAKE_ONE}")
    return Sealing([bytes.fromhex(line) for line in lines])
