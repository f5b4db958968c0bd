"""Rounds that are killed while they write a checkpoint, each in a process of its own.

In: a folder. Out: in it, for each method and moment, the workspace that SIGKILL left. The processes
are forked from one that has imported the training libraries and has trained nothing yet.

Run: `python -m tests.contract.learning_round.killed_rounds FOLDER`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model

from edge_node.learning import checkpoints
from edge_node.learning.batches import Lesson
from edge_node.learning.training import TrainedRound, train_round
from edge_node.learning.workplace import Workplace
from tests.contract.learning_round.grpo_rounds import SAMPLES, make_plan
from tests.contract.learning_round.test_grpo import train
from tests.fakes.policy_rollouts import PolicyRollouts
from tests.fakes.tiny_model import answer_ids, prompt_ids, tiny_model

STEPS = 5
"""A checkpoint every two steps and at the end; the second one is not finished."""


def sft(workspace: Path) -> TrainedRound:
    own = [Lesson(prompt_ids(f"w{n}"), answer_ids(f"w{n + 9} w3")) for n in range(5)]
    plan = make_plan(grpo=None, batch_own=3, steps=STEPS)
    return train_round(plan, Workplace(tiny_model(), None, workspace), own=own, anchors=[])


def grpo(workspace: Path) -> TrainedRound:
    return train(make_plan(steps=STEPS), PolicyRollouts(SAMPLES), workspace)


def at_the_second(call: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return (call if calls == 1 else then)(*args, **kwargs)

    return counted


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def inside_a_file() -> None:
    """The factors are on disk by half, and nothing else is."""
    save = peft.peft_model.safe_save_file

    def half(tensors: Any, path: str, **options: Any) -> None:
        save(tensors, path, **options)
        os.truncate(path, Path(path).stat().st_size // 2)
        die()

    peft.peft_model.safe_save_file = at_the_second(save, half)


def before_the_seal() -> None:
    """Every file is on disk, and what seals them is under another name."""
    replace = Path.replace
    dies = at_the_second(replace, lambda *_: die())

    def replaced(self: Path, target: Path) -> Path:
        made: Path = (dies if target.name == checkpoints.SEAL else replace)(self, target)
        return made

    Path.replace = replaced  # type: ignore[method-assign, assignment]


METHODS = {"sft": sft, "grpo": grpo}
MOMENTS = {"inside-a-file": inside_a_file, "before-the-seal": before_the_seal}


def main(folder: Path) -> None:
    for method, run in METHODS.items():
        for moment, arrange in MOMENTS.items():
            workspace = folder / f"{method}-{moment}"
            workspace.mkdir()
            child = os.fork()
            if child == 0:
                arrange()
                run(workspace)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            print(workspace.name, os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
