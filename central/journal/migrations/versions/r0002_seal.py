"""Central's signature beside the events. No later change of the tables may change this file."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("events", sa.Column("seal", sa.Text, nullable=False, server_default=""))
