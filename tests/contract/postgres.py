"""A real PostgreSQL for tests: Debian's `initdb` and `postgres`, on a Unix socket, gone afterwards.

In: a temporary directory. Out: a SQLAlchemy URL of an empty database. PostgreSQL refuses to run as
root, so there it runs as `postgres` or `nobody`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

START_S = 30.0


def binaries() -> Path | None:
    """The folder with `postgres` and `initdb`, found by what is on PATH."""
    found = shutil.which("postgres")
    if found is None:
        return None
    folder = Path(found).resolve().parent
    return folder if (folder / "initdb").exists() else None


def _account() -> pwd.struct_passwd | None:
    """Whom PostgreSQL runs as: nobody else than us, unless we are root."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None


@contextmanager
def running_postgres() -> Iterator[sa.URL]:
    """A server of its own; the URL names the database `postgres`."""
    folder = binaries()
    assert folder is not None
    account = _account()
    identity: dict[str, int] = {"user": account.pw_uid, "group": account.pw_gid} if account else {}
    # Not pytest's folder: other users cannot enter it, and a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="lorikeet-pg-") as place:
        if account:
            os.chown(place, account.pw_uid, account.pw_gid)
        data = Path(place) / "data"
        common = {"cwd": place, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}, **identity}
        subprocess.run(
            [
                folder / "initdb", "-D", data, "-U", "lorikeet",
                "-A", "trust", "-E", "UTF8", "--no-sync",
            ],
            check=True, stdout=subprocess.DEVNULL, **common,  # type: ignore[call-overload]
        )  # fmt: skip
        with (Path(place) / "log").open("wb") as log:
            server = subprocess.Popen(
                [
                    folder / "postgres", "-D", data, "-k", place,
                    "-c", "listen_addresses=", "-c", "shared_buffers=16MB", "-c", "fsync=off",
                ],
                stdout=log, stderr=log, **common,  # type: ignore[call-overload]
            )  # fmt: skip
        try:
            url = sa.URL.create(
                "postgresql+psycopg", "lorikeet", database="postgres", query={"host": place}
            )
            _wait(url, server, Path(place) / "log")
            yield url
        finally:
            server.send_signal(
                signal.SIGQUIT
            )  # "immediate": waits for no client and writes nothing
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait(url: sa.URL, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    engine = sa.create_engine(url)
    while True:
        try:
            with engine.connect():
                break
        except sa.exc.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(
                    f"PostgreSQL did not start: {log.read_text()[-2000:]}"
                ) from None
            time.sleep(0.05)
    engine.dispose()
