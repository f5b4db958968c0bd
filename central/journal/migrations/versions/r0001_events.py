"""The table of events of 0.1.0. No later change of the tables may change this file."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column(
            "sequence",
            sa.BigInteger().with_variant(sa.Integer, "sqlite"),
            primary_key=True,
            autoincrement=False,
        ),
        *(
            sa.Column(name, sa.Text, nullable=False)
            for name in ("at", "kind", "cohort", "subject", "body", "previous_hash", "hash")
        ),
        sa.Column("seal", sa.Text, nullable=False, server_default=""),
    )
