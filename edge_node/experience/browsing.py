"""What is in the experience store, for people and their tools.

In: a selection of interactions. Out: a line for each, counts by environment and kind, and what was
said of one. Texts are read with `ExperienceStore.interaction` and `feedback` alone. Reads change
nothing and wait for no writer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edge_node.experience.records import Told
from edge_node.experience.selection import Selection
from edge_node.experience.verdicts import LAST, VERDICT, VERDICTS, Verdicts

PAGE = 500
"""Ids that are read at once."""


@dataclass(frozen=True)
class Line:
    """One interaction without its texts. verdict: what counts of what was said of it alone, or
    empty. kinds: of all that was said of it, in order.
    """

    id: str
    created_at: str
    model: str
    environment: str
    episode: str
    user: str
    prompt_tokens: int
    answer_tokens: int
    verdict: str
    kinds: tuple[str, ...]
    unusable: str


@dataclass(frozen=True)
class Kinds:
    """How much there is of one environment. feedback: by kind."""

    environment: str
    interactions: int
    feedback: dict[str, int]


class Browsing(Verdicts):
    """The part of the experience store that shows what it holds."""

    def lines(self, selection: Selection, *, limit: int) -> list[Line]:
        """The newest `limit` interactions of `selection`, newest first."""
        rows = self._query(
            "SELECT i.id, i.created_at, i.model, COALESCE(l.environment, '') AS environment, "
            "COALESCE(l.episode, '') AS episode, COALESCE(u.user, '') AS user, "
            "LENGTH(unseal(i.prompt_ids)) / 4 AS prompt_tokens, LENGTH(unseal(i.answer_ids)) / 4 "
            f"AS answer_tokens, i.unusable {selection.sql} ORDER BY i.created_at DESC, i.id LIMIT "
            ":limit",
            {**selection.values, "limit": limit},
        )
        return [
            Line(**dict(row), verdict=self.verdict(row["id"]), kinds=self._kinds_of(row["id"]))
            for row in rows
        ]

    def count(self, selection: Selection) -> int:
        """How many interactions it means."""
        return self._count(f"SELECT COUNT(*) {selection.sql}", selection.values)

    def ids(self, selection: Selection) -> Iterator[str]:
        """Ids of the interactions of `selection`, oldest first, as many as there are now: a node
        that serves adds to them meanwhile.
        """
        at, last, left = "", "", self.count(selection)
        while left:
            rows = self._query(
                f"SELECT i.id, i.created_at {selection.sql} AND (i.created_at, i.id) > (:at, "
                ":last) ORDER BY i.created_at, i.id LIMIT :page",
                {**selection.values, "at": at, "last": last, "page": min(PAGE, left)},
            )
            if not rows:  # some were deleted meanwhile
                return
            yield from (row["id"] for row in rows)
            at, last, left = rows[-1]["created_at"], rows[-1]["id"], left - len(rows)

    def by_environment(self) -> list[Kinds]:
        """Counts of each environment that is named, and of what names none (empty)."""
        rows = self._query(
            "SELECT COALESCE(l.environment, '') AS environment, COUNT(*) AS count FROM "
            "interactions i LEFT JOIN labels l ON l.interaction_id = i.id GROUP BY 1 ORDER BY 1"
        )
        said = self._query(
            "SELECT COALESCE(l.environment, '') AS environment, f.kind, COUNT(*) AS count FROM "
            "feedback f LEFT JOIN labels l ON l.interaction_id = f.interaction_id GROUP BY 1, 2 "
            "ORDER BY 1, 2"
        )
        return [
            Kinds(
                row["environment"],
                row["count"],
                {
                    one["kind"]: one["count"]
                    for one in said
                    if one["environment"] == row["environment"]
                },
            )
            for row in rows
        ]

    def waiting(self) -> int:
        """How much feedback waits for its answers."""
        return self._count("SELECT COUNT(*) FROM waiting")

    def said_of(self, interaction_id: str) -> list[Told]:
        """All that was said of an interaction, in order; preferences for and against it too."""
        rows = self._query(
            "SELECT f.number, COALESCE(f.part_of, f.id) AS id FROM feedback f WHERE "
            "f.interaction_id = :id UNION SELECT f.number, f.id FROM comparisons c JOIN feedback f "
            "ON f.number = c.number WHERE json_extract(c.said, '$.rejected[0]') = :id ORDER BY 1",
            {"id": interaction_id},
        )
        return [self.feedback(row["id"]) for row in rows]

    def teaching(self, interaction_id: str) -> list[Told]:
        """What counts and can be learnt of what was said of it: the verdict, and the newest word on
        each pair that it was chosen of, and on its group.
        """
        rows = self._query(
            f"SELECT f.id {VERDICTS} AND f.unusable = '' AND f.interaction_id = :id UNION ALL "
            "SELECT f.id FROM comparisons c JOIN feedback f ON f.number = c.number WHERE "
            "f.interaction_id = :id AND f.unusable = '' AND c.number = (SELECT MAX(newest.number) "
            "FROM comparisons newest WHERE newest.kind = c.kind AND newest.subject = c.subject)",
            {"id": interaction_id, "up_to": LAST},
        )
        return [self.feedback(row["id"]) for row in rows]

    def verdict(self, interaction_id: str) -> str:
        """correction, liked, disliked, undecided, or empty: what counts of what was said of it."""
        rows = self._query(
            f"SELECT {VERDICT} AS verdict {VERDICTS} AND f.interaction_id = :id",
            {"id": interaction_id, "up_to": LAST},
        )
        return str(rows[0]["verdict"]) if rows else ""

    def labels(self, interaction_id: str) -> dict[str, str | None]:
        """Its `episode` and `environment`, as far as the client named them."""
        rows = self._query(
            "SELECT episode, environment FROM labels WHERE interaction_id = ?", (interaction_id,)
        )
        return dict(rows[0]) if rows else {}

    def _kinds_of(self, interaction_id: str) -> tuple[str, ...]:
        rows = self._query(
            "SELECT kind FROM feedback WHERE interaction_id = ? ORDER BY number", (interaction_id,)
        )
        return tuple(row["kind"] for row in rows)
