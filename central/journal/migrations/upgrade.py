"""Brings a journal's database to today's schema, with alembic's revisions.

In: an engine and today's tables. Out: a database with those tables, which names its revision (table
`alembic_version`).
Guarantees: a new database gets today's tables at once. One made by newer software is refused and
left as it is. A kill in between is repaired by the next start.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from central.errors import StorageError

if TYPE_CHECKING:  # imported only by a database that needs it
    from alembic.config import Config

HEAD = "0001"
"""Today's schema."""
_VERSION = sa.Table(
    "alembic_version",
    sa.MetaData(),
    sa.Column("version_num", sa.String(32), primary_key=True, nullable=False),
)


def upgrade_schema(engine: sa.Engine, tables: sa.MetaData) -> None:
    """Raises StorageError for a schema of other software, SQLAlchemyError from the database."""
    with engine.begin() as connection:
        present = set(sa.inspect(connection).get_table_names())
        is_new = not present & set(tables.tables)
        _VERSION.create(connection, checkfirst=True)
        revision = connection.execute(sa.select(_VERSION.c.version_num)).scalar()
        if revision is None:
            if not is_new:
                raise StorageError(
                    "The journal's database has a table of events and no schema revision. Expected "
                    "a journal of Lorikeet, or an empty database: restore a backup, or set "
                    "CENTRAL_JOURNAL__URL to another database."
                )
            revision = HEAD
            connection.execute(sa.insert(_VERSION).values(version_num=revision))
    if is_new:
        tables.create_all(engine)
    elif revision != HEAD:
        _migrate(engine, revision)


def _migrate(engine: sa.Engine, revision: str) -> None:
    from alembic import command
    from alembic.script import ScriptDirectory

    config = configuration()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if revision not in known:
        raise StorageError(
            f"The journal's database has schema revision {revision!r}; this central knows "
            f"{', '.join(sorted(known))}. It was written by newer software: start that one, or "
            "restore an older backup."
        )
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, HEAD)


def configuration() -> Config:
    """Alembic's configuration without an ini file."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return config
