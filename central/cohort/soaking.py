"""The end of a canary's soak: central makes it stable, or says why nothing happens.

In: the state, again and again, and which nodes are connected. Out: one journal event when the soak
is over. Guarantee: what counts is in the journal (releases/canary.py). One thing is not: that a
node which serves the canary is connected at that moment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from central.cohort.planning import parse_time
from central.journal import Journal, State
from central.releases.canary import Soak, find_soak, promotion
from central.settings import ChannelPolicy

log = logging.getLogger(__name__)

NOTICE_S = 60.0
"""After so long without a node that serves the canary, the log says so."""


class SoakWatch:
    """One per cohort; `look` is called under the journal's lock."""

    def __init__(
        self,
        cohort: str,
        journal: Journal,
        policy: ChannelPolicy,
        is_connected: Callable[[str], bool],
        clock: Callable[[], str],
    ) -> None:
        self._cohort = cohort
        self._journal = journal
        self._policy = policy
        self._is_connected = is_connected
        self._clock = clock
        self._noticed: tuple[str, str] = ("", "")

    def look(self, state: State) -> None:
        """Promote the cohort's canary if its soak is over."""
        soak = find_soak(state, self._cohort, self._policy)
        if soak is None:
            return
        now = parse_time(self._clock())
        if soak.promotes_at is not None and now < parse_time(soak.promotes_at):
            return
        if soak.promotes_at is not None and any(map(self._is_connected, soak.serving)):
            self._journal.append(promotion(state, soak.release, "stable", "central"))
            log.info(
                "canary is stable",
                extra={"cohort": self._cohort, "release": soak.release.release_id},
            )
        elif soak.troubled or (now - parse_time(soak.since)).total_seconds() >= NOTICE_S:
            self._notice(soak)

    def _notice(self, soak: Soak) -> None:
        """Once for a release and what it waits for."""
        waits_for = (
            soak.waits_for if soak.promotes_at is None else "a node that serves it to be connected"
        )
        if (notice := (soak.release.release_id, waits_for)) != self._noticed:
            self._noticed = notice
            extra = {
                "cohort": self._cohort,
                "release": soak.release.manifest.label,
                "waits_for": waits_for,
            }
            log.warning("canary waits, and the cohort's merges with it", extra=extra)
