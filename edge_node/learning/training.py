"""One round of supervised fine-tuning with TRL and PEFT (importing this module loads torch).

In: a RoundPlan, the base model, the start release's PEFT directory, lessons. Out: the fresh LoRA's
factors, float32, by the base's module names, with scale alpha / rank (LoRA, arXiv:2106.09685,
section 4.1), and metrics. The start release is merged into a float32 copy of the base first, so the
factors are the increment and nothing has to be subtracted. The same plan and data give the same
bytes, also across `kill -9` and resume.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig

from edge_node.learning.anchors import Anchors
from edge_node.learning.batches import (
    Lesson,
    TokenRow,
    anchor_batches,
    make_batches,
    sample_lessons,
)
from edge_node.learning.checkpoints import newest_valid, seal
from edge_node.learning.compute import count_parameters, training_dtype
from edge_node.learning.drift import kl_of_examples
from edge_node.learning.keeping import (
    KL_BASE,
    Keeping,
    KeepingCollator,
    KeepingTrainer,
    RoundTrainer,
)
from edge_node.learning.plans import RoundPlan
from edge_node.learning.steered import steered
from edge_node.learning.teacher import load_states
from edge_node.learning.text_model import load_text_model
from edge_node.learning.workplace import Workplace
from protos.base import Layout, read_layout
from protos.lora import LoraModule, LoraTensors

log = logging.getLogger(__name__)

_PREFIX = "base_model.model."


class RoundObsolete(Exception):
    """The round's update would be of no use any more; nothing is lost by not finishing it."""


@dataclass(frozen=True)
class TrainedRound:
    """tensors: the increment.

    metrics: loss_first, loss_last, steps, seconds, the distinct examples and anchors, and
    kl_release (drift.py); with the base's own samples as anchors also kl_first, kl_last, from the
    base on them. All kl are in nats a token.
    """

    tensors: LoraTensors
    metrics: dict[str, float]
    model: Any
    """The trained PeftModel, for whoever wants to look at it."""


def train_round(
    plan: RoundPlan,
    place: Workplace,
    *,
    own: Sequence[Lesson],
    anchors: Sequence[Lesson] | Anchors,
) -> TrainedRound:
    """Train, going on from the newest valid checkpoint in the folder of `place`.

    Args:
        own: the node's examples, at least one.
        anchors: examples whose answers are learnt, or the base's own samples, on which the model is
            kept near the base.

    Raises:
        RoundObsolete: `place.obsolete` said so.
        RoundCancelled, RoundPaused: `place.steering` said so.
        SettingsError: the samples in `anchors` do not fit the base.
    """
    disable_progress_bar()
    layout = read_layout(place.base)
    model, states = load_start_and_states(place, anchors)
    tokenizer = AutoTokenizer.from_pretrained(place.base, local_files_only=True)
    batches = make_batches(plan, own, kinds_of(anchors))
    batch = len(batches.rows) // plan.steps
    resume, clock = resumed(plan, place)
    trainer = _trainer(
        plan, tokenizer, states,
        model=model,
        args=SFTConfig(
            **common_arguments(plan, place),
            per_device_train_batch_size=batch,
            # Rows are already in training order, batch by batch.
            train_sampling_strategy="sequential",
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=_dataset(batches.rows),
        peft_config=fresh_lora(plan, place, layout),
        callbacks=callbacks(place, clock),
    )  # fmt: skip
    trainer.batch_tokens = place.compute.batch_tokens
    trainer.remove_callback(PrinterCallback)  # it would print every step's loss
    trainer.train(resume_from_checkpoint=resume)
    metrics = {
        **first_and_last(trainer, "loss"),
        **(first_and_last(trainer, KL_BASE, "kl") if states is not None else {}),
        "kl_release": kl_of_examples(trainer, batches.rows[-batch:][: plan.batch_own]),
        "steps": float(trainer.state.global_step),
        "seconds": round(clock.elapsed_s(), 3),
        "examples": float(batches.own),
        "anchors": float(batches.anchors),
    }
    return TrainedRound(read_factors(trainer.model, plan.alpha, layout), metrics, trainer.model)


def kinds_of(anchors: Sequence[Lesson] | Anchors) -> dict[str, list[Lesson]]:
    """Kind of anchor -> its examples."""
    if isinstance(anchors, Anchors):
        return sample_lessons(anchors.samples)
    return {"anchor": list(anchors)} if anchors else {}


def _trainer(plan: RoundPlan, tokenizer: Any, states: list[Any] | None, **rest: Any) -> Any:
    if states is None:
        return RoundTrainer(processing_class=tokenizer, **rest)
    return KeepingTrainer(
        kl=plan.kl,
        states=states,
        data_collator=KeepingCollator(padding_of(tokenizer)),
        processing_class=tokenizer,
        **rest,
    )


def keeping_of(
    plan: RoundPlan,
    place: Workplace,
    anchors: Sequence[Lesson] | Anchors | None,
    states: list[torch.Tensor] | None,
    tokenizer: Any,
) -> Keeping | None:
    """What a trainer without samples in its batches adds to each step; None without samples."""
    if not isinstance(anchors, Anchors) or states is None or not plan.batch_anchor:
        return None
    return Keeping(
        anchor_batches(plan, kinds_of(anchors)),
        kl=plan.kl,
        states=states,
        pad_token_id=padding_of(tokenizer),
        batch_tokens=place.compute.batch_tokens,
    )


def first_and_last(trainer: Any, key: str, name: str | None = None) -> dict[str, float]:
    """The first and the last `key` of the trainer's log, as `name`."""
    seen = [float(entry[key]) for entry in trainer.state.log_history if key in entry]
    return {f"{name or key}_first": seen[0], f"{name or key}_last": seen[-1]}


def _beat_in(layer: Any, beat: Callable[[], None]) -> None:
    """Where a step takes minutes (a large base on a CPU), only its layers show that it goes on."""

    def passed(layer: Any, inputs: Any, output: Any) -> None:
        beat()
        if output.requires_grad:
            output.register_hook(lambda gradient: beat())

    layer.register_forward_hook(passed)


def load_start(base: Path, release: Path | None) -> Any:
    """The base in float32 with the release merged in, frozen by PEFT later."""
    model = load_text_model(base)
    merge_release(model, release, read_layout(base))
    return model


def load_start_and_states(
    place: Workplace, anchors: Sequence[Lesson] | Anchors | None
) -> tuple[Any, list[torch.Tensor] | None]:
    """`load_start`, whose layers beat, and the base's states of `anchors` where these are its own
    samples.

    Raises SettingsError when the samples do not fit the base.
    """
    model = load_text_model(place.base)
    states = load_states(anchors, model) if isinstance(anchors, Anchors) else None
    merge_release(model, place.release, read_layout(place.base))
    place.beat()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            _beat_in(layer, place.beat)
    return model, states


def padding_of(tokenizer: Any) -> int:
    """The token that fills a batch's shorter rows; no loss sees it."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    return int(end if pad is None else pad)


def merge_release(model: Any, release: Path | None, layout: Layout) -> None:
    """Adds B @ A to the weight of each module of the release, whose scale is 1."""
    if release is None:
        return
    factors = load_file(release / "adapter_model.safetensors")
    ending = ".lora_A.weight"
    for key in sorted(key for key in factors if key.endswith(ending)):
        stem = key.removesuffix(ending)
        weight = model.get_submodule(layout.text_name(stem.removeprefix(_PREFIX))).weight.data
        weight += factors[f"{stem}.lora_B.weight"] @ factors[key]


def read_factors(model: Any, alpha: float, layout: Layout) -> LoraTensors:
    """The adapter's factors by the base's names: A float32 [rank, in], B float32 [out, rank]."""
    state = get_peft_model_state_dict(model, adapter_name="default")
    modules = {}
    for key, a in state.items():
        if not key.endswith(".lora_A.weight"):
            continue
        stem = key.removesuffix(".lora_A.weight")
        b = state[f"{stem}.lora_B.weight"]
        modules[layout.base_name(stem.removeprefix(_PREFIX))] = LoraModule(
            A=a.detach().float().cpu().numpy(),
            B=b.detach().float().cpu().numpy(),
            scale=alpha / a.shape[0],
        )
    return LoraTensors(modules)


class Clock:
    def __init__(self, before_s: float) -> None:
        self._begin = time.monotonic() - before_s

    def elapsed_s(self) -> float:
        return time.monotonic() - self._begin


class Sealer(TrainerCallback):  # type: ignore[misc]
    """Seals each checkpoint when it is complete; ends a round that is no longer of use."""

    def __init__(self, clock: Clock, obsolete: Callable[[], bool]) -> None:
        self._clock = clock
        self._obsolete = obsolete

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", self._clock.elapsed_s())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._obsolete():
            raise RoundObsolete(f"after step {state.global_step} of {state.max_steps}")


def resumed(plan: RoundPlan, place: Workplace) -> tuple[str | None, Clock]:
    """The newest valid checkpoint, if any, and the round's time, which goes on from there."""
    found = newest_valid(place.folder)
    if found is None:
        return None, Clock(0.0)
    checkpoint, elapsed_s = found
    log.info("round resumes", extra={"round_id": plan.round_id, "checkpoint": checkpoint.name})
    return str(checkpoint), Clock(elapsed_s)


def fresh_lora(plan: RoundPlan, place: Workplace, layout: Layout) -> LoraConfig:
    """The adapter that the round trains; its first step finds it without effect."""
    names = place.modules or layout.module_shapes
    return LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=[layout.text_name(name) for name in names],
        task_type="CAUSAL_LM",
    )


def callbacks(place: Workplace, clock: Clock) -> list[TrainerCallback]:
    """Of rounds of every method, in their order."""
    return [Sealer(clock, place.obsolete), *steered(place.steering, clock.elapsed_s)]


def common_arguments(plan: RoundPlan, place: Workplace) -> dict[str, Any]:
    """What rounds of every method tell TRL alike."""
    dtype = training_dtype(plan.dtype, count_parameters(place.base))
    return {
        "output_dir": str(place.folder),
        "seed": plan.seed,
        "max_steps": plan.steps,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "warmup_steps": 0,
        # Autocast: the weights stay float32.
        "bf16": dtype == "bfloat16",
        "use_cpu": place.compute.device == "cpu",
        "gradient_checkpointing": place.compute.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "save_strategy": "steps",
        "save_steps": plan.checkpoint_steps,
        # The previous one stays until the newest is sealed.
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "eval_strategy": "no",
        "push_to_hub": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }


def _dataset(rows: Sequence[TokenRow]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rows],
            "labels": [row.labels for row in rows],
            "sample": [row.sample for row in rows],
        }
    )
