"""A trainer that is steered: the callback between transformers' loop and a Steering.

In: the trainer's events. Out: calls of a Steering, and TensorBoard files by transformers' own
callback. (Importing this module loads torch.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from edge_node.learning.reports import Progress, read_entries
from edge_node.learning.steering import RoundPaused, Steering


class Steered(TrainerCallback):  # type: ignore[misc]
    """Comes after the callback that seals checkpoints."""

    def __init__(self, steering: Steering, elapsed_s: Callable[[], float]) -> None:
        """elapsed_s: the round's time in training so far, over restarts."""
        self._steering = steering
        self._elapsed_s = elapsed_s
        self._first = 0
        self._began = time.monotonic()
        self._pausing = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first, self._began = state.global_step, time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steering.let_users_pass()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steering.expect_wanted()
        if state.global_step < state.max_steps and self._steering.must_pause():
            self._pausing = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" not in state.log_history[-1]:  # of the whole training, at its end
            return
        done = state.global_step - self._first
        pace_s = (time.monotonic() - self._began) / done if done else None
        tokens = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self._steering.tell(
            Progress(
                step=state.global_step,
                steps=state.max_steps,
                seconds=round(self._elapsed_s(), 1),
                eta_s=None
                if pace_s is None
                else round(pace_s * (state.max_steps - state.global_step), 1),
                tokens=int(tokens[-1]) if tokens else None,
                entries=read_entries(state.log_history),
            )
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._pausing and not control.should_training_stop:
            self._steering.pauses()
            raise RoundPaused(f"after step {state.global_step} of {state.max_steps}")


def steered(steering: Steering, elapsed_s: Callable[[], float]) -> list[TrainerCallback]:
    """The callbacks of a steered round."""
    callbacks: list[TrainerCallback] = [Steered(steering, elapsed_s)]
    if steering.tensorboard is not None:
        writer = TensorBoardCallback()
        writer.logging_dir = str(steering.tensorboard)
        callbacks.insert(0, writer)
    return callbacks
