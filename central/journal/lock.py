"""One writer per journal: `central serve`, or whoever else writes while no central runs.

In: the journal's SQLAlchemy URL. Out: nothing.

Guarantees: of two that want to write to one database the second gets StorageError, also from
another machine and with another data directory. A killed holder holds nothing. SQLite: flock on
`<file>.lock`. PostgreSQL: an advisory lock on a connection of its own; a holder whose machine
vanished is given up after about half a minute. Should the lock be lost with its connection, the
journal's own numbering still refuses the second writer's event.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from central.errors import StorageError
from central.file_lock import FileLock

SUFFIX = ".lock"
"""Suffix of the lock's file beside a SQLite file."""
KEY = int.from_bytes(b"lorikeet", "big", signed=True)
"""One lock per database of PostgreSQL."""
KEEPALIVE = {"tcp_keepalives_idle": 15, "tcp_keepalives_interval": 5, "tcp_keepalives_count": 3}
"""Seconds, seconds, times."""


class WriterLock:
    """A context; not re-entrant."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stack = ExitStack()

    def __enter__(self) -> WriterLock:
        try:
            url = sa.make_url(self._url)
            if url.get_backend_name() == "postgresql":
                self._lock_postgres(url)
            elif url.get_backend_name() == "sqlite" and url.database:
                path = Path(f"{url.database}{SUFFIX}")
                self._stack.enter_context(FileLock(path, _taken(str(path))))
        except (SQLAlchemyError, ImportError) as error:
            cause = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise StorageError(
                f"The journal cannot be opened: {cause}. Check CENTRAL_JOURNAL__URL and the data "
                "directory."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _lock_postgres(self, url: sa.URL) -> None:
        engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
        with ExitStack() as opened:
            opened.callback(engine.dispose)
            connection = opened.enter_context(engine.connect())
            for name, value in KEEPALIVE.items():
                connection.execute(sa.text(f"set {name} = {value}"))
            if (
                connection.execute(sa.select(sa.func.pg_try_advisory_lock(KEY))).scalar()
                is not True
            ):
                raise StorageError(_taken(url.render_as_string(hide_password=True)))
            self._stack = opened.pop_all()


def _taken(where: str) -> str:
    return (
        f"Another central writes to this journal ({where}). A journal has one writer: stop that "
        "central first, or set CENTRAL_JOURNAL__URL to a database of its own."
    )
