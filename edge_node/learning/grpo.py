"""One round of reinforcement learning with TRL and PEFT (importing this module loads torch).

In: a RoundPlan, the base model, the start release, exercises, and rollouts from the node's own
vLLM. Out: the fresh LoRA's factors as in training.py, and metrics. Group-relative policy
optimisation (GRPO, arXiv:2402.03300, section 4.1) with the token-level loss of DAPO
(arXiv:2503.14476, equation 8), one optimizer step a batch of rollouts, and truncated importance
sampling against vLLM's log-probabilities at temperature 1. Only tokens that the model sampled are
trained on, never a tool's result. `beta` is the weight of the KL divergence from the start release,
which is merged into the frozen weights. The base's own samples keep the model near the base, as in
an sft round (keeping.py). With a server that
answers equal requests equally, the same plan gives the same bytes, also across `kill -9`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from peft import set_peft_model_state_dict
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig

from edge_node.errors import ServingError
from edge_node.learning.anchors import Anchors
from edge_node.learning.checkpoints import newest_valid
from edge_node.learning.keeping import KL_BASE
from edge_node.learning.plans import GrpoPlan, RoundPlan
from edge_node.learning.records import NoReward, NothingToGain, RoundImpossible
from edge_node.learning.rewards import CORRECT_IT, Exercise, Judge
from edge_node.learning.rollouts import Answer, Ask, Rollouts
from edge_node.learning.training import (
    TrainedRound,
    callbacks,
    common_arguments,
    first_and_last,
    fresh_lora,
    keeping_of,
    load_start_and_states,
    read_factors,
    resumed,
)
from edge_node.learning.trl_rollouts import RoundTrainer, check_trl, use_server
from edge_node.learning.workplace import Workplace
from protos.base import read_layout
from protos.lora import LoraTensors

log = logging.getLogger(__name__)

FLAT_STEPS = 5
"""After so many steps in which no task told its answers apart, a round has nothing more to learn.
"""
MAX_SEQUENCES = 32
"""Most answers in one forward pass; a step's gradient is summed over passes."""

Publish = Callable[[int, LoraTensors], str]
"""(step, increment) -> the name under which vLLM serves the policy now; raises ServingError."""


def train_grpo(
    plan: RoundPlan,
    place: Workplace,
    *,
    exercises: Sequence[Exercise],
    rollouts: Rollouts,
    publish: Publish,
    samples: Anchors | None = None,
    warm: Callable[[], dict[str, Any]] | None = None,
) -> TrainedRound:
    """Train, going on from the newest valid checkpoint in the folder of `place`.

    Args:
        exercises: steps x prompts of them, in training order.
        samples: the base's own, on which the model is kept near the base.
        warm: makes the adapter that the first step starts from (warm.py); None: one without effect.

    Raises:
        NothingToGain: no task told its answers apart; NoReward: and all of them scored zero.
        SettingsError: `samples` do not fit the base.
        RoundObsolete: `place.obsolete` said so.
        RoundCancelled, RoundPaused: `place.steering` said so.
        RoundImpossible: no answer of a step got a reward.
        ServingError: vLLM answers no rollout.
    """
    assert plan.grpo is not None
    check_trl()
    disable_progress_bar()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func may change: check_trl looks
    layout = read_layout(place.base)
    warmed = warm() if warm is not None and newest_valid(place.folder) is None else None
    model, states = load_start_and_states(place, samples)
    resume, clock = resumed(plan, place)
    explorer = _Explorer(plan.grpo, exercises, rollouts)
    tokenizer = AutoTokenizer.from_pretrained(place.base, local_files_only=True)
    trainer = RoundTrainer(
        model=model,
        judge=Judge(exercises, plan.grpo.samples, place.beat),
        explores=plan.feedback is None,
        keeping=keeping_of(plan, place, samples, states, tokenizer),
        args=_arguments(plan, plan.grpo, place),
        train_dataset=Dataset.from_dict({"prompt": [str(n) for n in range(len(exercises))]}),
        processing_class=tokenizer,
        peft_config=fresh_lora(plan, place, layout),
        rollout_func=explorer.explore,
        callbacks=[*callbacks(place, clock), _Watcher(plan.grpo)],
    )

    def serve() -> None:
        increment = read_factors(trainer.model, plan.alpha, layout)
        explorer.policy = publish(trainer.state.global_step, increment)

    if warmed is not None:
        set_peft_model_state_dict(trainer.model, warmed)
    explorer.republish = serve
    use_server(trainer, serve)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    serve()  # for whoever measures it
    metrics = _metrics(trainer.state.log_history) | {
        **(first_and_last(trainer, KL_BASE, "kl") if states is not None else {}),
        "steps": float(trainer.state.global_step),
        "seconds": round(clock.elapsed_s(), 3),
        "examples": float(
            len({(e.environment, e.task.id) for e in _asked(exercises, plan, trainer)})
        ),
    }
    return TrainedRound(read_factors(trainer.model, plan.alpha, layout), metrics, trainer.model)


class _Explorer:
    """TRL's rollout function: the numbers of exercises in, their sampled answers out."""

    def __init__(self, plan: GrpoPlan, exercises: Sequence[Exercise], rollouts: Rollouts) -> None:
        self._plan = plan
        self._exercises = exercises
        self._rollouts = rollouts
        self.policy = ""
        """The name under which vLLM serves the weights of this step."""
        self.republish: Callable[[], None] = lambda: None

    def explore(self, prompts: Sequence[str], trainer: Any) -> dict[str, list[Any]]:
        """prompts: each number `samples` times in a row. An answer that failed is an empty one."""
        numbers = [int(number) for number in prompts[:: self._plan.samples]]
        exercises = [self._exercises[number] for number in numbers]
        groups = self._answers([_ask(exercise) for exercise in exercises])
        found: list[Answer | None] = []
        for group in groups:
            found += group or [None] * self._plan.samples
        # An episode without a turn has no token either.
        end = trainer.processing_class.eos_token_id
        failed = Answer([end], [0.0], "")
        answers = [one if one is not None and one.token_ids else failed for one in found]
        # The prompts of an agent are known by its run alone.
        known = [list(one.prompt_ids) or [end] for one in exercises]
        prompts_of = [prompt for prompt in known for _ in range(self._plan.samples)]
        return {
            "prompt_ids": [
                prompt if one.episode is None else one.episode.prompt_ids
                for prompt, one in zip(prompts_of, answers, strict=True)
            ],
            "completion_ids": [one.token_ids for one in answers],
            "logprobs": [one.logprobs for one in answers],
            "answer": [None if one is failed else one.text for one in answers],
            "episode_reward": [one.episode and one.episode.reward for one in answers],
            "env_mask": [_mask(one) for one in answers],
        }

    def _answers(self, asks: Sequence[Ask]) -> list[Sequence[Answer | None] | None]:
        """Asks once more for what failed: a vLLM that was started anew does not know the policy."""
        groups = list(asyncio.run(self._rollouts.sample(self.policy, asks)))
        failed = [number for number, group in enumerate(groups) if group is None]
        if not failed:
            return groups
        self.republish()
        again = asyncio.run(self._rollouts.sample(self.policy, [asks[n] for n in failed]))
        for number, group in zip(failed, again, strict=True):
            groups[number] = group
        if all(group is None for group in groups):
            raise ServingError(
                f"vLLM answered none of {len(asks)} rollout requests for {self.policy}. See "
                "logs/vllm.log; the round goes on from its checkpoint."
            )
        log.warning(
            "rollout requests failed",
            extra={"failed": len(failed), "left_out": sum(group is None for group in groups)},
        )
        return groups


def _ask(exercise: Exercise) -> Ask:
    play = None if exercise.rules is None else exercise.play
    run = exercise.run if exercise.is_played and play is None else None
    return Ask(exercise.prompt_ids, exercise.seed, play, run, exercise.environment)


def _mask(answer: Answer) -> list[int]:
    """1 for each token to learn from: those that the model sampled."""
    sampled = [True] * len(answer.token_ids) if answer.episode is None else answer.episode.sampled
    return [int(one) for one in sampled]


class _Watcher(TrainerCallback):  # type: ignore[misc]
    """Ends a round that has nothing more to learn, from what the trainer has logged."""

    def __init__(self, plan: GrpoPlan) -> None:
        self._plan = plan

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = [entry for entry in state.log_history if "groups_skipped" in entry]
        if not steps:
            return
        if steps[-1]["unscored"] >= self._plan.prompts * self._plan.samples:
            raise RoundImpossible(
                f"No answer of step {len(steps)} got a reward: every verifier of "
                f"{', '.join(self._plan.environments)} raised.",
                CORRECT_IT,
            )
        flat = [entry["groups_skipped"] >= self._plan.prompts for entry in steps]
        last = flat[-min(FLAT_STEPS, state.max_steps) :]
        zero = not any(entry["reward"] for entry in steps)
        ended = all(flat) and len(flat) == len(last) >= min(FLAT_STEPS, state.max_steps)
        # After a warm start equal answers may all be right: the local gate tells.
        if ended and (zero or self._plan.warm is None):
            raise (NoReward if zero else NothingToGain)(
                f"all {self._plan.samples} answers to each of {len(flat) * self._plan.prompts} "
                f"tasks got the same reward, {steps[-1]['reward']:.3g} in the mean at last"
            )
        control.should_training_stop |= len(last) >= FLAT_STEPS and all(last)


def _asked(exercises: Sequence[Exercise], plan: RoundPlan, trainer: Any) -> Sequence[Exercise]:
    assert plan.grpo is not None
    return exercises[: trainer.state.global_step * plan.grpo.prompts]


def _metrics(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Rewards and counts of the round; the trainer's history is part of each checkpoint."""
    steps = [entry for entry in history if "groups_skipped" in entry]
    rewards = [float(entry["reward"]) for entry in steps if entry["reward"] is not None]
    return {
        "grpo": 1.0,
        "reward_first": rewards[0],
        "reward_last": rewards[-1],
        "groups_skipped": sum(float(entry["groups_skipped"]) for entry in steps),
        "unscored": sum(float(entry["unscored"]) for entry in steps),
        # Of the policy that gave the last step's answers.
        **{name: float(value) for name, value in steps[-1].items() if name == "kl_release"},
    }


def _arguments(plan: RoundPlan, grpo: GrpoPlan, place: Workplace) -> GRPOConfig:
    answers = grpo.prompts * grpo.samples
    together = max(size for size in range(1, MAX_SEQUENCES + 1) if answers % size == 0)
    return GRPOConfig(
        **common_arguments(plan, place),
        per_device_train_batch_size=together,
        gradient_accumulation_steps=answers // together,
        num_generations=grpo.samples,
        max_completion_length=grpo.max_answer_tokens,
        temperature=grpo.temperature,
        beta=grpo.beta,
        use_vllm=False,  # use_server
        # vLLM's log-probabilities are those of the sampling distribution at temperature 1 only.
        vllm_importance_sampling_correction=grpo.temperature == 1,
        # A client's groups were answered by the start release: each step is further away from it.
        vllm_importance_sampling_mode="token_truncate" if plan.feedback else "sequence_mask",
        shuffle_dataset=False,
        remove_unused_columns=False,
    )
