"""The file of access keys: who may use the node's endpoint, and for what.

In: names, scopes and users. Out: a new key, shown once, and a JSON file that holds its hash.
Guarantees: a write is whole or not at all, also after `kill -9`; of two writers at once one gets an
error and none loses a key; a damaged file is an error, never a file without keys.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from edge_node.disk import write_file
from edge_node.errors import EdgeError, SettingsError, StorageError
from edge_node.settings import EdgeSettings
from lorikeet.durable import TEMPORARY_SUFFIX
from lorikeet.locks import locked

FILE_NAME = "keys.json"
PREFIX = "lk-"
"""A key begins with it, so that a scanner of source code finds one that was committed."""
SECRET_BYTES = 32
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
USER = r"^[\x21-\x7e]{1,128}$"


class Scope(StrEnum):
    """infer: ask the model. feedback: judge answers. admin: the rest, such as metrics."""

    INFER = "infer"
    FEEDBACK = "feedback"
    ADMIN = "admin"


class _Record(BaseModel):
    # An unknown field may be a restriction that this software would not keep: it is refused.
    model_config = ConfigDict(frozen=True, extra="forbid")


class Key(_Record):
    """One key. sha256: of its text, in hex. user: whose answers it may judge; None: all.

    capture: whether answers to it may be kept.
    """

    name: Annotated[str, Field(pattern=NAME)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    user: Annotated[str, Field(pattern=USER)] | None = None
    capture: bool = True
    created: AwareDatetime
    revoked: AwareDatetime | None = None


class _KeyFile(_Record):
    version: Literal[1] = 1
    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _names_are_unique(self) -> _KeyFile:
        names = [key.name for key in self.keys]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two keys have the name {twice[0]}")
        return self


def keys_file(settings: EdgeSettings) -> Path:
    """Where the node's keys are."""
    return settings.serving.keys_file or settings.data_dir / FILE_NAME


def digest(key: bytes) -> str:
    """What is kept of a key.

    A plain SHA-256, without salt or stretching: those protect passwords, which can be guessed. A
    key has 256 random bits, so no table holds it and no guessing finds it.
    """
    return hashlib.sha256(key).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """Every key in the file, revoked ones too.

    Raises FileNotFoundError without a file, StorageError for one that cannot be read or used.
    """
    try:
        return parse_keys(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read: {error.strerror or error}. The node's own user must own it."
        ) from error
    except ValueError as error:
        raise StorageError(
            f"{path} is damaged: {error}. Put back a good one, or move it away and make new keys "
            "with `edge-node keys create`."
        ) from error


def parse_keys(data: bytes) -> tuple[Key, ...]:
    """The keys in a file's bytes; ValueError says what is wrong and quotes nothing of it."""
    try:
        return _KeyFile.model_validate_json(data).keys
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        parts = list(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":  # the last part is of the file: it may be a key
            parts[-1] = "an unknown field"
        place = ".".join(parts)
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None


def create_key(
    path: Path, name: str, scopes: Sequence[Scope], user: str | None, *, capture: bool = True
) -> str:
    """Adds a key to the file, which is made when it is absent; returns the key.

    capture: whether answers to it may be kept.

    Raises SettingsError for a name or user that is not possible, EdgeError for a name that is taken
    and StorageError.
    """
    key = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    with _writing(path) as keys:
        if name in {other.name for other in keys}:
            raise EdgeError(
                f"{path} has a key {name!r} already. Expected a new name, also after a key was "
                f"revoked. Take another one, such as {name}-2."
            )
        try:
            new = Key(
                name=name,
                sha256=digest(key.encode()),
                scopes=tuple(dict.fromkeys(scopes)),
                user=user,
                capture=capture,
                created=datetime.now(UTC),
            )
        except ValidationError as error:
            field = str(error.errors()[0]["loc"][0])
            expected = {
                "name": "at most 63 letters, digits, dots, dashes and underscores, and a letter or "
                "digit first",
                "user": "1 to 128 printable ASCII characters without spaces",
            }
            raise SettingsError(
                f"The key's {field} is {(name if field == 'name' else user)!r}. "
                f"Expected {expected[field]}."
            ) from None
        _write(path, (*keys, new))
    return key


def revoke_key(path: Path, name: str) -> Key:
    """Marks a key as revoked; one that was stays as it is. Raises EdgeError and StorageError."""
    if not path.exists():
        raise EdgeError(
            f"{path} is not there, so it has no key {name!r}. Check EDGE_DATA_DIR and "
            "EDGE_SERVING__KEYS_FILE."
        )
    with _writing(path) as keys:
        found = next((key for key in keys if key.name == name), None)
        if found is None:
            known = ", ".join(key.name for key in keys) or "none"
            raise EdgeError(
                f"{path} has no key {name!r}. Expected the name of one, not the key itself. Names: "
                f"{known}."
            )
        if found.revoked is not None:
            return found
        revoked = found.model_copy(update={"revoked": datetime.now(UTC)})
        _write(path, tuple(revoked if key is found else key for key in keys))
    return revoked


@contextmanager
def _writing(path: Path) -> Iterator[tuple[Key, ...]]:
    """The keys in the file, while nobody else writes it. What a killed writer left is removed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}.lock")):
            for left in path.parent.glob(f"{path.name}.*{TEMPORARY_SUFFIX}"):
                left.unlink(missing_ok=True)
            try:
                keys = read_keys(path)
            except FileNotFoundError:
                keys = ()
            yield keys
    except BlockingIOError as error:
        raise StorageError(
            f"Another `edge-node keys` writes {path} now. Run this one again."
        ) from error
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}. Expected a folder that this "
            "user can write. A file of a Kubernetes Secret is read-only: make keys with an "
            f"EDGE_DATA_DIR of your own, and put its {FILE_NAME} into the Secret."
        ) from error


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    write_file(path, _KeyFile(keys=keys).model_dump_json(indent=1).encode() + b"\n", 0o600)
