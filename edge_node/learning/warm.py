"""The warm start of a grpo round: a few supervised steps where every answer scored zero.

In: a plan with a warm start, the round's train tasks. Out: examples that the verifiers accept, and
the adapter's weights after learning them, from which the grpo steps go on. It is an sft round in
all else (training.py): same anchors, own checkpoints below the round's, same bytes after a kill.
Importing this module loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from peft import get_peft_model_state_dict

from edge_node.environments import Environment
from edge_node.errors import EnvironmentFault
from edge_node.experience import Example
from edge_node.learning.anchors import Anchors
from edge_node.learning.batches import Lesson
from edge_node.learning.plans import RoundPlan
from edge_node.learning.records import NothingToGain
from edge_node.learning.rewards import Exercise, reward
from edge_node.learning.training import train_round
from edge_node.learning.workplace import Workplace
from edge_node.rendering import Renderer

FOLDER = "warm"
"""Its checkpoints, in the round's workspace."""


def warm_lessons(
    exercises: Sequence[Exercise],
    renderer: Renderer,
    longest_answer: int,
    stored: Sequence[Example],
    beat: Callable[[], None] = lambda: None,
) -> list[Lesson]:
    """Reference answers to the train tasks that score above zero; without any, what is stored.

    An answer that is longer than a rollout may be is left out. Raises NothingToGain when there is
    no example.
    """
    tasks = {(one.environment, one.task.id): one for one in exercises}
    lessons = []
    for exercise in tasks.values():
        beat()
        answer = _reference(exercise)
        if answer is None or not (reward(exercise, answer) or 0) > 0:
            continue
        target = renderer.answer_ids(answer)
        if len(target) <= longest_answer:
            lessons.append(Lesson(exercise.prompt_ids, target))
    lessons = lessons or [Lesson(one.prompt_ids, one.target_ids) for one in stored]
    if not lessons:
        raise NothingToGain(
            f"every answer scored zero, and no verified example is known to start from: the "
            f"verifiers accept no reference answer to {len(tasks)} train tasks, and no corrected "
            "or verified answer is stored"
        )
    return lessons


def _reference(exercise: Exercise) -> str | None:
    """None where the environment knows none, or raises. Raises EnvironmentFault when it hangs."""
    if not isinstance(exercise.verifier, Environment):  # an episode has no single answer
        return None
    try:
        return exercise.verifier.reference_answer(exercise.task)
    except Exception as error:  # a plug-in may raise anything
        if isinstance(error, EnvironmentFault) and not error.raised:
            raise
        return None


def warm_start(
    plan: RoundPlan,
    place: Workplace,
    *,
    lessons: Sequence[Lesson],
    anchors: Sequence[Lesson] | Anchors,
) -> dict[str, Any]:
    """PEFT's state of the adapter after the warm steps; arguments and errors of `train_round`.

    place: of the whole round.
    """
    assert plan.grpo is not None
    assert plan.grpo.warm is not None
    steps = {"steps": plan.grpo.warm.steps, "learning_rate": plan.grpo.warm.learning_rate}
    folder = place.folder / FOLDER
    folder.mkdir(exist_ok=True)
    with place.steering.stage("warm start"):
        trained = train_round(
            plan.model_copy(update=steps | {"grpo": None}),
            replace(place, folder=folder),
            own=lessons,
            anchors=anchors,
        )
    state: dict[str, Any] = get_peft_model_state_dict(trained.model)
    return {name: values.detach().cpu().clone() for name, values in state.items()}
