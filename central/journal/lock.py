"""One writer per journal: held by `central serve`, and by whoever else writes while no central runs.

In: the journal's SQLAlchemy URL. Out: nothing. Guarantees: of two that want to write to one database the second gets StorageError,
also from another machine and with another data directory; a killed holder holds nothing. SQLite: flock on `<file>.lock`.
PostgreSQL: an advisory lock on a connection of its own; a holder whose machine vanished is given up after about half a minute.
Should the lock be lost with its connection, the journal's own numbering still refuses the second writer's event.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from central.durable import make_directory, storage
from central.errors import StorageError

KEY = int.from_bytes(b"lorikeet", "big", signed=True)
"""One lock per database of PostgreSQL."""
KEEPALIVE = {"tcp_keepalives_idle": 15, "tcp_keepalives_interval": 5, "tcp_keepalives_count": 3}
"""Seconds, seconds, times."""


class WriterLock:
    """A context; not re-entrant."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._descriptor = -1
        self._engine: sa.Engine | None = None
        self._connection: Any = None

    def __enter__(self) -> WriterLock:
        try:
            parsed = sa.make_url(self._url)
            if parsed.get_backend_name() == "sqlite":
                if parsed.database:
                    self._lock_file(Path(f"{parsed.database}.lock"))
            elif parsed.get_backend_name() == "postgresql":
                self._lock_postgres(parsed)
        except (SQLAlchemyError, ImportError) as error:
            cause = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise StorageError(
                f"The journal cannot be opened: {cause}. Check CENTRAL_JOURNAL__URL and the data directory."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._engine is not None:
            self._connection.close()
            self._engine.dispose()
            self._engine = None

    def _lock_file(self, path: Path) -> None:
        make_directory(path.parent)
        with storage(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise _taken(str(path)) from None
        self._descriptor = descriptor

    def _lock_postgres(self, url: sa.URL) -> None:
        self._engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
        try:
            self._connection = self._engine.connect()
            for name, value in KEEPALIVE.items():
                self._connection.execute(sa.text(f"set {name} = {value}"))
            if self._connection.execute(sa.select(sa.func.pg_try_advisory_lock(KEY))).scalar() is not True:
                raise _taken(url.render_as_string(hide_password=True))
        except BaseException:
            if self._connection is not None:
                self._connection.close()
            self._engine.dispose()
            self._engine = None
            raise


def _taken(where: str) -> StorageError:
    return StorageError(
        f"Another central writes to this journal ({where}). A journal has one writer: stop that central first, or set "
        "CENTRAL_JOURNAL__URL to a database of its own."
    )
