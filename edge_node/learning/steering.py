"""What a round asks, and tells, between its steps.

In: the node's settings, an operator's orders, the clock on the wall, vLLM's control socket. Out: a
round that goes on, waits, ends at a checkpoint, or ends for good; its report. Imports nothing
heavy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from edge_node import schedule
from edge_node.errors import ServingError
from edge_node.learning.orders import Orders
from edge_node.learning.plans import RoundPlan
from edge_node.learning.records import RoundStore
from edge_node.learning.reports import Progress, Report, keep_newest, report_folder
from edge_node.serving import ControlClient, ControlState, control_socket
from edge_node.settings import EdgeSettings

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""How often a round that waits looks whether the users have been served."""
ASK_TIMEOUT_S = 5.0
"""A vLLM that does not answer serves nobody: the round goes on."""


class RoundPaused(Exception):
    """The round ended at a checkpoint, and goes on from it later."""


class Steering:
    """The default: nobody is asked, and nobody is told."""

    tensorboard: Path | None = None
    """Folder for TensorBoard files; None: none are written."""

    def expect_wanted(self) -> None:
        """Raises RoundCancelled when an operator ended the round."""

    def must_pause(self) -> bool:
        """Whether the round is to end at a checkpoint now, and to go on later."""
        return False

    def pauses(self) -> None:
        """The checkpoint is sealed, and the round ends."""

    def let_users_pass(self) -> None:
        """Returns when the users are served well enough, or the wait took its longest time.

        Raises RoundCancelled.
        """

    def tell(self, progress: Progress) -> None:
        """Called after each step."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """The steps inside the block are not the plan's; `name` says what they are."""
        return nullcontext()

    def handing_over(self) -> AbstractContextManager[None]:
        """The update goes into the outbox inside the block; raises RoundCancelled before it."""
        return nullcontext()


UNSTEERED = Steering()


@dataclass(frozen=True)
class UserLimits:
    """Above one of them the learner waits. None: no limit."""

    in_flight: int | None
    first_token_s: float | None

    @property
    def are_any(self) -> bool:
        return self.in_flight is not None or self.first_token_s is not None

    def are_passed(self, state: ControlState) -> bool:
        """Whether the users wait too long, or are too many."""
        return (self.in_flight is not None and state.users_in_flight() > self.in_flight) or (
            self.first_token_s is not None and state.first_token_s > self.first_token_s
        )


class NodeSteering(Steering):
    """Of one round of this node's learner."""

    def __init__(
        self, settings: EdgeSettings, rounds: RoundStore, plan: RoundPlan, beat: Callable[[], None]
    ) -> None:
        self._settings = settings.learning
        self._orders = Orders(rounds)
        self._round_id = plan.round_id
        self._beat = beat
        self._limits = UserLimits(
            settings.learning.yield_in_flight, settings.learning.yield_first_token_s
        )
        self._control = ControlClient(control_socket(settings.data_dir), timeout_s=ASK_TIMEOUT_S)
        self._stage = ""
        folder = report_folder(settings.data_dir, plan.round_id)
        self._report = Report(folder)
        self.tensorboard = folder / "tensorboard" if settings.learning.tensorboard else None
        folder.mkdir(parents=True, exist_ok=True)
        keep_newest(settings.data_dir)

    def expect_wanted(self) -> None:
        self._orders.expect_wanted(self._round_id)

    def must_pause(self) -> bool:
        return not schedule.is_open(self._settings.schedule)

    def pauses(self) -> None:
        self._report.waits("a window of EDGE_LEARNING__SCHEDULE")

    def let_users_pass(self) -> None:
        ends = time.monotonic() + self._settings.yield_at_most_s
        while self._users_wait() and time.monotonic() < ends:
            self._report.waits("users' requests")
            self._beat()
            self.expect_wanted()
            time.sleep(LOOK_S)
        self._report.waits("")

    def tell(self, progress: Progress) -> None:
        self._report.tell(replace(progress, stage=self._stage))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        tensorboard, self._stage = self.tensorboard, name
        if tensorboard is not None:  # whose steps would be mixed with those of the plan
            self.tensorboard = tensorboard / name.replace(" ", "_")
        yield
        self.tensorboard, self._stage = tensorboard, ""

    def ends(self) -> None:
        """No further step is made, for whatever reason."""
        self._report.end()

    def handing_over(self) -> AbstractContextManager[None]:
        return self._orders.handing_over(self._round_id)

    def _users_wait(self) -> bool:
        if not self._limits.are_any:
            return False
        try:
            return self._limits.are_passed(asyncio.run(self._control.state()))
        except ServingError:
            return False
