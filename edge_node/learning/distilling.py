"""One round of self-distillation with TRL and PEFT (importing this module loads torch).

In: a RoundPlan with its DistilPlan, lessons. Out: as in training.py. Self-distillation fine-tuning
(SDFT, arXiv:2601.19897): the model samples an answer to each prompt, and learns to give its tokens
the probabilities that the start release gives them when it has seen the right answer before. So the
teacher is the model without the LoRA, with the demonstration in its context: prompt, right answer,
and the prompt once more, in the token ids that were served. The divergence is TRL's: between
Kullback-Leibler's two directions, on the student's 100 likeliest tokens. Anchors are learnt beside.
The same plan and data give the same bytes, also across `kill -9` and resume: a checkpoint has the
state of the sampler's dice.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
import trl
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PrinterCallback
from transformers.utils.logging import disable_progress_bar

from edge_node.errors import SettingsError
from edge_node.learning.anchors import Anchors
from edge_node.learning.batches import Lesson, anchor_batches, make_batches
from edge_node.learning.comparing import TRL_SERIES, BesideTrainer
from edge_node.learning.drift import kl_of_examples
from edge_node.learning.keeping import KL_BASE
from edge_node.learning.plans import RoundPlan
from edge_node.learning.records import RoundImpossible
from edge_node.learning.training import (
    TrainedRound,
    callbacks,
    common_arguments,
    first_and_last,
    fresh_lora,
    keeping_of,
    kinds_of,
    load_start_and_states,
    read_factors,
    resumed,
)
from edge_node.learning.workplace import Workplace
from protos.base import read_layout

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # it may change: check_trl looks
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

TRIED = 16
"""Lessons on which a round looks whether the release can use a demonstration."""
LEAST_USE = 0.1
"""Nats a token by which a demonstration makes its answer likelier, at least."""
LIKELIEST = 100
"""Tokens of the student's distribution that are compared with the teacher's."""
_DIVERGENCE = "self_distillation/distillation_loss"
_READ = {
    "_tokenize_prompts": ("prompts",),
    "_prepare_training_batch": ("self.sample_rollouts(inputs)",),
    "sample_rollouts": ("self._tokenize_prompts(prompts)",),
    "_get_teacher_context_for_self_distillation": ("use_adapter(target_model, adapter_name=None)",),
}
"""Method of SDFTTrainer -> what its source reads."""


def train_distilled(
    plan: RoundPlan,
    place: Workplace,
    *,
    own: Sequence[Lesson],
    anchors: Sequence[Lesson] | Anchors,
    limit: int,
) -> TrainedRound:
    """Train, going on from the newest valid checkpoint in the folder of `place`.

    Args:
        own, anchors: as in `train_round`.
        limit: tokens that the model takes. A lesson whose demonstration and answer do not fit is
            left out.

    Raises:
        RoundImpossible: no lesson fits, or the release makes nothing of a demonstration.
        RoundObsolete: `place.obsolete` said so.
        RoundCancelled, RoundPaused: `place.steering` said so.
        SettingsError: the samples in `anchors` do not fit the base, or TRL is another.
    """
    assert plan.distil is not None
    check_trl()
    disable_progress_bar()
    fit = [one for one in own if _length(one) + plan.distil.max_answer_tokens <= limit]
    if not any(one.recent for one in fit):
        raise RoundImpossible(
            f"EDGE_LEARNING__SDFT__ENABLED is true, and no example fits: its prompt twice, its "
            f"answer and {plan.distil.max_answer_tokens} tokens more may have {limit} together.",
            "Set it to false, or lower EDGE_LEARNING__SDFT__MAX_ANSWER_TOKENS; then restart the "
            "node.",
        )
    layout = read_layout(place.base)
    model, states = load_start_and_states(place, anchors)
    use = usefulness(model, fit[:TRIED])
    if not use >= LEAST_USE:
        raise RoundImpossible(
            "EDGE_LEARNING__SDFT__ENABLED is true, and the model makes nothing of a right answer "
            f"in its context: the answer becomes likelier by {use:.3g} nats a token; expected at "
            f"least {LEAST_USE}.",
            "Set it to false and restart the node: this model does not learn from itself.",
        )
    tokenizer = AutoTokenizer.from_pretrained(place.base, local_files_only=True)
    rows = make_batches(plan, fit, {}).rows
    resume, clock = resumed(plan, place)
    trainer = _Trainer(
        model=model,
        args=SDFTConfig(
            **common_arguments(plan, place),
            per_device_train_batch_size=plan.batch_own,
            num_generations=1,
            shuffle_dataset=False,  # rows are in training order
            max_prompt_length=None,
            max_completion_length=plan.distil.max_answer_tokens,
            distillation_topk=min(LIKELIEST, model.config.get_text_config().vocab_size),
            teacher_model_kind="base",
            teacher_prompt_template="{prompt} {privileged_context} {prompt}",
        ),
        train_dataset=Dataset.from_list([_as_text(row) for row in rows]),
        processing_class=tokenizer,
        peft_config=fresh_lora(plan, place, layout),
        callbacks=callbacks(place, clock),
    )
    kinds = kinds_of(anchors)
    beside = anchor_batches(plan, kinds) if kinds and plan.batch_anchor else []
    trainer.keep(beside, keeping_of(plan, place, anchors, states, tokenizer))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    metrics = {
        "sdft": 1.0,
        "demonstration_use": use,
        **first_and_last(trainer, "loss"),
        **first_and_last(trainer, _DIVERGENCE, "divergence"),
        **(first_and_last(trainer, KL_BASE, "kl") if states is not None else {}),
        "kl_release": kl_of_examples(trainer, rows[-plan.batch_own :]),
        "steps": float(trainer.state.global_step),
        "seconds": round(clock.elapsed_s(), 3),
        "examples": float(len({tuple(row.input_ids) for row in rows})),
        "anchors": float(len({tuple(row.input_ids) for batch in beside for row in batch})),
    }
    return TrainedRound(read_factors(trainer.model, plan.alpha, layout), metrics, trainer.model)


def demonstrated(prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """What the teacher is given: an answered turn, and its prompt once more."""
    return [*prompt, *answer, *prompt]


def usefulness(model: Any, lessons: Sequence[Lesson]) -> float:
    """By how much a demonstration makes the right answers likelier, nats a token, mean."""
    gains = [
        _logprob(model, demonstrated(one.prompt_ids, one.target_ids), one.target_ids)
        - _logprob(model, one.prompt_ids, one.target_ids)
        for one in lessons
    ]
    return sum(gains) / len(gains)


def _logprob(model: Any, context: Sequence[int], answer: Sequence[int]) -> float:
    """Mean log-probability of the tokens of `answer` after `context`."""
    ids = torch.tensor([[*context, *answer]], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1]
    return -float(cross_entropy(logits.float(), ids[0, len(context) :]))


def check_trl() -> None:
    """Raises SettingsError when TRL's trainer does not have what this module builds on."""
    differences = []
    if trl.__version__.rpartition(".")[0] != TRL_SERIES:
        differences.append(f"its version is not {TRL_SERIES}.*")
    for method, parts in _READ.items():
        source = inspect.getsource(getattr(SDFTTrainer, method, SDFTTrainer.__init__))
        differences += [
            f"SDFTTrainer.{method} does not use {part}" for part in parts if part not in source
        ]
    if differences:
        raise SettingsError(
            f"TRL {trl.__version__} does not have the surface that self-distillation was written "
            f"for: {'; '.join(differences)}. Install trl=={TRL_SERIES}.*, or set "
            "EDGE_LEARNING__SDFT__ENABLED to false."
        )


def _length(lesson: Lesson) -> int:
    return len(demonstrated(lesson.prompt_ids, lesson.target_ids))


def _as_text(row: Any) -> dict[str, str]:
    """TRL puts texts together; these are of numbers, which `_tokenize_prompts` reads."""
    learnt = next(number for number, label in enumerate(row.labels) if label >= 0)
    numbers = [str(token) for token in row.input_ids]
    return {
        "prompt": " ".join(numbers[:learnt]),
        "privileged_context": " ".join(numbers[learnt:]),
    }


class _Trainer(BesideTrainer, SDFTTrainer):  # type: ignore[misc]
    def _tokenize_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """TRL would render and tokenise texts; these are the ids that were served."""
        return [[int(token) for token in prompt.split()] for prompt in prompts]
