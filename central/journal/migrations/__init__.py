"""The journal's schema: a database of any age enters, one with today's tables leaves."""

from central.journal.migrations.upgrade import HEAD, upgrade_schema

__all__ = ["HEAD", "upgrade_schema"]
