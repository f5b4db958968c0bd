"""Which interactions a command means.

In: what `edge-node experience` was asked for. Out: the condition of a query and its values. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

FROM = """
FROM interactions i LEFT JOIN labels l ON l.interaction_id = i.id
LEFT JOIN users u ON u.interaction_id = i.id
WHERE (:before IS NULL OR i.created_at < :before)
  AND (:environment IS NULL OR COALESCE(l.environment, '') = :environment)
  AND (:episode IS NULL OR l.episode = :episode)
  AND (:user IS NULL OR u.user = :user)
"""


@dataclass(frozen=True)
class Selection:
    """Each condition that is set must hold; none is everything.

    before: answered earlier than this time (ISO 8601, UTC). environment: as the client named it;
    empty: it named none. user: of the access key that asked.
    """

    before: str | None = None
    environment: str | None = None
    episode: str | None = None
    user: str | None = None

    @property
    def sql(self) -> str:
        """FROM and WHERE, with the interactions as `i`, labels as `l` and users as `u`."""
        return FROM

    @property
    def values(self) -> dict[str, str | None]:
        """Of the names in `sql`."""
        return dict(vars(self))

    @property
    def is_everything(self) -> bool:
        return self == Selection()

    @property
    def is_user(self) -> bool:
        """Whether it names a user and nothing else."""
        return self.user is not None and self == Selection(user=self.user)

    @property
    def is_age(self) -> bool:
        """Whether it names a time and nothing else."""
        return self.before is not None and self == Selection(before=self.before)
