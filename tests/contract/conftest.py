"""What contract tests share: servers, a central of their own with a node, its commands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from central.cli import main
from tests.contract.central_harness import Central, Node, Run, limited_central
from tests.contract.postgres import binaries, running_postgres
from tests.contract.s3 import S3, running_s3


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[sa.URL]:
    """A PostgreSQL; skips where there is none."""
    if binaries() is None:
        pytest.skip(
            "PostgreSQL is not on PATH: install Debian's postgresql, or put its bin folder on PATH"
        )
    with running_postgres() as url:
        yield url


@pytest.fixture
def postgres(postgres_server: sa.URL, request: pytest.FixtureRequest) -> sa.URL:
    """An empty database of its own."""
    name = f"test_{abs(hash(request.node.nodeid)) % 10**9}"
    engine = sa.create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"create database {name}"))
    engine.dispose()
    return postgres_server.set(database=name)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 with one bucket."""
    with running_s3() as server:
        yield server


@pytest.fixture
async def central(tmp_path: Path) -> AsyncIterator[Central]:
    """With limits that small payloads can pass; a file that needs another one makes its own."""
    async with limited_central(tmp_path) as running:
        yield running


@pytest.fixture
async def node(central: Central) -> Node:
    """Enrolled in the shared cohort."""
    return await central.enroll("a", await central.token())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process: (exit code, what it printed)."""

    def command(data_dir: Path, *arguments: str, **environment: str) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            for key, value in {"CENTRAL_DATA_DIR": str(data_dir), **environment}.items():
                patch.setenv(key, value)
            with pytest.raises(SystemExit) as ended:
                main(list(arguments))
        out, err = capsys.readouterr()
        return int(str(ended.value.code)), out + err

    return command
