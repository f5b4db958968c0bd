"""One round on preferences or thumbs with TRL and PEFT (importing this module loads torch).

In: a RoundPlan, the base model, the start release's PEFT directory, and what users preferred or
liked, in the token ids that were served. Out: the fresh LoRA's factors as in training.py, and
metrics. Preferences: direct preference optimisation (DPO, arXiv:2305.18290, equation 7). Thumbs:
Kahneman-Tversky optimisation (KTO, arXiv:2402.01306, equation 8), with batches of as many liked as
disliked answers. The reference of both is the model without the LoRA, so `beta` pulls back to the
release that the node received. Anchors are learnt beside, as in an sft round. The same plan and
data give the same bytes, also across `kill -9` and resume.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, Trainer
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from edge_node.errors import SettingsError
from edge_node.experience import Pair, Thumb
from edge_node.learning.anchors import Anchors
from edge_node.learning.batches import (
    Lesson,
    TokenRow,
    anchor_batches,
    pair_batches,
    thumb_batches,
    token_row,
)
from edge_node.learning.drift import kl_of_examples
from edge_node.learning.keeping import KL_BASE, Keeping
from edge_node.learning.plans import RoundPlan
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

TRL_SERIES = "1.16"
_COLUMNS = {
    DPOTrainer: ("prompt_ids", "chosen_ids", "rejected_ids"),
    KTOTrainer: ("prompt_ids", "completion_ids", "KL_completion_ids", "label"),
}
"""Trainer -> the columns of a prepared data set, which it reads."""


def train_compared(
    plan: RoundPlan,
    place: Workplace,
    *,
    compared: Sequence[Any],
    anchors: Sequence[Lesson] | Anchors,
) -> TrainedRound:
    """Train, going on from the newest valid checkpoint in the folder of `place`.

    Args:
        compared: `Pair`s of a dpo round, at least one; `Thumb`s of a kto round, at least one of
            either kind.
        anchors: as in `train_round`.

    Raises:
        RoundObsolete: `place.obsolete` said so.
        RoundCancelled, RoundPaused: `place.steering` said so.
        SettingsError: the samples in `anchors` do not fit the base, or TRL is another.
    """
    assert plan.feedback is not None
    check_trl()
    disable_progress_bar()
    layout = read_layout(place.base)
    model, states = load_start_and_states(place, anchors)
    resume, clock = resumed(plan, place)
    tokenizer = AutoTokenizer.from_pretrained(place.base, local_files_only=True)
    batches: list[list[Any]]
    if plan.method == "dpo":
        make, config, batches = _PairTrainer, DPOConfig, pair_batches(plan, compared)
        rows = _pair_rows(batches)
    else:
        make, config, batches = _ThumbTrainer, KTOConfig, thumb_batches(plan, compared)
        rows = _thumb_rows(batches)
    trainer = make(
        model=model,
        args=config(
            **common_arguments(plan, place),
            per_device_train_batch_size=plan.feedback.batch,
            train_sampling_strategy="sequential",  # rows are in training order
            max_length=None,
            beta=plan.feedback.beta,
        ),
        train_dataset=Dataset.from_list(rows),
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
        plan.method: 1.0,
        **first_and_last(trainer, "loss"),
        **first_and_last(trainer, "rewards/margins", "margin"),
        **(first_and_last(trainer, KL_BASE, "kl") if states is not None else {}),
        "kl_release": kl_of_examples(trainer, _answer_rows(batches[-1])),
        "steps": float(trainer.state.global_step),
        "seconds": round(clock.elapsed_s(), 3),
        "examples": float(len({one for batch in batches for one in batch})),
        "anchors": float(len({tuple(row.input_ids) for batch in beside for row in batch})),
    }
    return TrainedRound(read_factors(trainer.model, plan.alpha, layout), metrics, trainer.model)


def check_trl() -> None:
    """Raises SettingsError when TRL's trainers do not read what this module gives them."""
    differences = []
    if trl.__version__.rpartition(".")[0] != TRL_SERIES:
        differences.append(f"its version is not {TRL_SERIES}.*")
    for trainer, columns in _COLUMNS.items():
        source = inspect.getsource(trainer._set_signature_columns_if_needed)
        differences += [
            f"{trainer.__name__} reads no {name}" for name in columns if f'"{name}"' not in source
        ]
        if "train_dataset = self._prepare_dataset(" not in inspect.getsource(trainer.__init__):
            differences.append(f"{trainer.__name__} does not call _prepare_dataset")
    if differences:
        raise SettingsError(
            f"TRL {trl.__version__} does not have the surface that dpo and kto rounds were written "
            f"for: {'; '.join(differences)}. Install trl=={TRL_SERIES}.*, or set "
            "EDGE_LEARNING__METHOD to sft."
        )


def _answer_rows(batch: Sequence[Any]) -> list[TokenRow]:
    """Each answer that the batch compares, after its prompt."""
    return [
        token_row(Lesson(one.prompt_ids, answer))
        for one in batch
        for answer in (
            (one.chosen_ids, one.rejected_ids) if isinstance(one, Pair) else (one.answer_ids,)
        )
    ]


def _pair_rows(batches: Sequence[Sequence[Pair]]) -> list[dict[str, Any]]:
    return [
        {
            "prompt_ids": list(pair.prompt_ids),
            "chosen_ids": list(pair.chosen_ids),
            "rejected_ids": list(pair.rejected_ids),
        }
        for batch in batches
        for pair in batch
    ]


def _thumb_rows(batches: Sequence[Sequence[Thumb]]) -> list[dict[str, Any]]:
    """Each row also has the answer of the row before it in the batch: with another's prompt it
    shows how far the model is from the reference, which KTO's loss needs.
    """
    return [
        {
            "prompt_ids": list(thumb.prompt_ids),
            "completion_ids": list(thumb.answer_ids),
            "KL_completion_ids": list(before.answer_ids),
            "label": thumb.liked,
        }
        for batch in batches
        for thumb, before in zip(batch, [batch[-1], *batch[:-1]], strict=True)
    ]


class BesideTrainer(Trainer):  # type: ignore[misc]
    """What trainers do otherwise than TRL's: rows are ready, nothing is sent anywhere, and anchors
    are learnt beside.
    """

    def keep(self, batches: Sequence[Sequence[TokenRow]], keeping: Keeping | None) -> None:
        """batches: the anchor rows of each step. keeping: where these are the base's samples."""
        self._batches, self._keeping = batches, keeping
        self._pad = DataCollatorForLanguageModeling(self.processing_class.pad_token_id)

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss if self._keeping is None else loss + self._keeping.add(self, model)

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, *args, **kwargs)
        return loss + self._beside(model) if self._batches and self._keeping is None else loss

    def _beside(self, model: Any) -> torch.Tensor:
        """Cross-entropy on the answers of anchor environments."""
        rows = self._batches[self.state.global_step]
        made = self._pad([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
        batch = {name: value.to(self.accelerator.device) for name, value in made.items()}
        loss: torch.Tensor = model(**batch, use_cache=False).loss
        return loss

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL would render and tokenise texts; the rows are the ids that were served."""
        return dataset

    def _send_telemetry(self) -> None:
        """Nothing leaves a node but its updates: TRL would report model and hardware to the Hub."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint needs no README."""


class _PairTrainer(BesideTrainer, DPOTrainer):  # type: ignore[misc]
    pass


class _ThumbTrainer(BesideTrainer, KTOTrainer):  # type: ignore[misc]
    pass
