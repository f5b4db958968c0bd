"""One round of supervised fine-tuning with TRL and PEFT (importing this module loads torch).

In: a RoundPlan, the base model, the start release's PEFT directory, lessons. Out: the fresh LoRA's factors, float32,
by the base's module names, with scale alpha / rank (LoRA, arXiv:2106.09685, section 4.1), and metrics. The start
release is merged into a float32 copy of the base first, so the factors are the increment and nothing has to be
subtracted. The same plan and data give the same bytes, also across `kill -9` and resume.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

from edge_node.learning.batches import Lesson, TokenRow, make_batches
from edge_node.learning.checkpoints import newest_valid, seal
from edge_node.learning.records import RoundPlan
from edge_node.learning.text_model import load_text_model
from protos.base import Layout, read_layout
from protos.lora import LoraModule, LoraTensors

log = logging.getLogger(__name__)

_PREFIX = "base_model.model."


class RoundObsolete(Exception):
    """The round's update would be of no use any more; nothing is lost by not finishing it."""


@dataclass(frozen=True)
class TrainedRound:
    """tensors: the increment; metrics: loss_first, loss_last, steps, seconds, examples and anchors
    (distinct ones that were trained on).
    """

    tensors: LoraTensors
    metrics: dict[str, float]
    model: Any
    """The trained PeftModel, for whoever wants to look at it."""


def train_round(
    plan: RoundPlan,
    *,
    base: Path,
    release: Path | None,
    own: Sequence[Lesson],
    anchors: Sequence[Lesson],
    workspace: Path,
    modules: Collection[str] | None = None,
    obsolete: Callable[[], bool] = lambda: False,
) -> TrainedRound:
    """Train, going on from the newest valid checkpoint in `workspace`.

    Args:
        release: PEFT directory of the start release; None for a release without modules (version 0).
        own: the node's examples, at least one.
        modules: names of the base's modules to train; all of them when None.
        obsolete: asked after each step.

    Raises:
        RoundObsolete: `obsolete` said so.
    """
    disable_progress_bar()
    layout = read_layout(base)
    model = load_start(base, release)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    batches = make_batches(plan, own, anchors)
    resume = newest_valid(workspace)
    if resume is not None:
        log.info("round resumes", extra={"round_id": plan.round_id, "checkpoint": resume[0].name})
    clock = _Clock(0.0 if resume is None else resume[1])
    trainer = _RoundTrainer(
        model=model,
        args=_arguments(plan, workspace, len(batches.rows) // plan.steps),
        train_dataset=_dataset(batches.rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=plan.rank, lora_alpha=plan.alpha, lora_dropout=0.0, bias="none",
            target_modules=[layout.text_name(name) for name in modules or layout.module_shapes],
            task_type="CAUSAL_LM",
        ),
        callbacks=[_Sealer(clock, obsolete)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # it would print every step's loss
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume[0]))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = {
        "loss_first": float(losses[0]),
        "loss_last": float(losses[-1]),
        "steps": float(trainer.state.global_step),
        "seconds": round(clock.elapsed_s(), 3),
        "examples": float(batches.own),
        "anchors": float(batches.anchors),
    }
    return TrainedRound(read_factors(trainer.model, plan.alpha, layout), metrics, trainer.model)


def load_start(base: Path, release: Path | None) -> Any:
    """The base in float32 with the release merged in, frozen by PEFT later."""
    model = load_text_model(base)
    if release is not None:
        _merge(model, release, read_layout(base))
    return model


def _merge(model: Any, release: Path, layout: Layout) -> None:
    """Adds B @ A to the weight of each module of the release, whose scale is 1."""
    factors = load_file(release / "adapter_model.safetensors")
    ending = ".lora_A.weight"
    for key in sorted(key for key in factors if key.endswith(ending)):
        stem = key.removesuffix(ending)
        weight = model.get_submodule(layout.text_name(stem.removeprefix(_PREFIX))).weight.data
        weight += factors[f"{stem}.lora_B.weight"] @ factors[key]


def read_factors(model: Any, alpha: float, layout: Layout) -> LoraTensors:
    """Factors of the trained adapter by the base's names: A float32 [rank, in_features], B float32 [out_features, rank]."""
    state = get_peft_model_state_dict(model, adapter_name="default")
    modules = {}
    for key, a in state.items():
        if not key.endswith(".lora_A.weight"):
            continue
        stem = key.removesuffix(".lora_A.weight")
        b = state[f"{stem}.lora_B.weight"]
        modules[layout.base_name(stem.removeprefix(_PREFIX))] = LoraModule(
            A=a.detach().float().cpu().numpy(), B=b.detach().float().cpu().numpy(), scale=alpha / a.shape[0]
        )
    return LoraTensors(modules)


class _RoundTrainer(SFTTrainer):  # type: ignore[misc]
    def _send_telemetry(self) -> None:
        """Nothing leaves a node but its updates: TRL would report model and hardware to the Hub."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint needs no README."""


class _Clock:
    def __init__(self, before_s: float) -> None:
        self._begin = time.monotonic() - before_s

    def elapsed_s(self) -> float:
        return time.monotonic() - self._begin


class _Sealer(TrainerCallback):  # type: ignore[misc]
    """Seals each checkpoint once the trainer has written all of it; ends a round that is of no use any more."""

    def __init__(self, clock: _Clock, obsolete: Callable[[], bool]) -> None:
        self._clock = clock
        self._obsolete = obsolete

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", self._clock.elapsed_s())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._obsolete():
            raise RoundObsolete(f"after step {state.global_step} of {state.max_steps}")


def _arguments(plan: RoundPlan, workspace: Path, batch: int) -> SFTConfig:
    return SFTConfig(
        output_dir=str(workspace),
        seed=plan.seed,
        max_steps=plan.steps,
        per_device_train_batch_size=batch,
        # Rows are already in training order, batch by batch.
        train_sampling_strategy="sequential",
        learning_rate=plan.learning_rate,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        warmup_steps=0,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="steps",
        save_steps=plan.checkpoint_steps,
        # The previous one stays until the newest is sealed.
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        eval_strategy="no",
        push_to_hub=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
    )


def _dataset(rows: Sequence[TokenRow]) -> Dataset:
    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})
