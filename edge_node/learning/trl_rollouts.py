"""All that we use of TRL's private surface, pinned to 1.16.*: rollouts from a server of our own.

In: a RoundTrainer that was built with `use_vllm=False` and a `rollout_func`. Out: the same trainer,
which tells us when its weights have changed, and corrects for the difference between vLLM's
log-probabilities and its own (truncated importance sampling). TRL would build a client for its own
kind of server otherwise. The RoundTrainer also measures `kl_release` and keeps the model near the
base. `check_trl` fails with a clear error on any TRL whose surface differs.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
import trl
from trl import GRPOTrainer

from edge_node.errors import SettingsError
from edge_node.learning.drift import kl_of_samples
from edge_node.learning.keeping import Keeping
from edge_node.learning.rewards import Judge

TRL_SERIES = "1.16"
_READ = {
    "_generate": (
        "rollout_func",
        "_last_loaded_step",
        "vllm_generation.sync_weights",
        'extra_fields.pop("env_mask", None)',
    ),
    "_generate_and_score_completions": (
        "completion_mask * tool_mask",
        "use_vllm and self.vllm_importance_sampling_correction",
        "sampling_per_token_logps_list",
        'output["old_per_token_logps"]',
        'output["ref_per_token_logps"]',
        "inp[key] = values[i]",
    ),
    "_get_per_token_logps_and_entropies": ("outputs.log_probs[:, -logits_to_keep:]",),
    "_prepare_inputs": ("shuffle_sequence_dict(generation_batch)",),
    "training_step": ("self._step % self.current_gradient_accumulation_steps == 0",),
    "_compute_loss": (
        'completion_mask * inputs["tool_mask"]',
        "use_vllm and self.vllm_importance_sampling_correction",
    ),
}
"""Method of GRPOTrainer -> what its source reads."""


class _Publisher:
    """Stands where TRL keeps its client of vLLM."""

    def __init__(self, publish: Callable[[], None]) -> None:
        self.sync_weights = publish


class RoundTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's, silent; `keeping` adds its loss to each optimizer step."""

    def __init__(
        self, *args: Any, judge: Judge, keeping: Keeping | None, explores: bool, **kwargs: Any
    ) -> None:
        """explores: the model itself samples the answers; only those tell its distance from the
        release.
        """
        super().__init__(*args, reward_funcs=judge, **kwargs)
        self._explores = explores
        self._judge = judge
        self._keeping = keeping

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        last = self._step % self.current_gradient_accumulation_steps == 0
        if self._keeping is not None and last:
            loss = loss + self._keeping.add(self, model)
        return loss

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = super()._generate_and_score_completions(inputs)
        # TRL subtracts the mean of a group, and rounding leaves a rest where all are equal. Adam
        # makes a whole step of it, however small.
        made["advantages"] *= made["advantages"].new_tensor(self._judge.teaches)
        if not self._explores:
            return made
        # What stands in for an answer that vLLM did not give is no sample; nor is a tool's result.
        mask = made["completion_mask"]
        answered = mask.new_tensor([row["answer"] is not None for row in inputs])
        sampled = mask * answered[:, None] * made.get("tool_mask", 1)
        self._metrics["train"]["kl_release"].append(kl_of_samples(*self._both(made), sampled))
        return made

    def _both(self, made: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The policy's and the release's log-probabilities of the answers, [answers, tokens]."""
        mine, release = made.get("old_per_token_logps"), made.get("ref_per_token_logps")
        if mine is None:
            mine = self._logps(made)
        if release is None:
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                release = self._logps(made)
        return mine, release

    def _logps(self, made: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            logps: torch.Tensor = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([made["prompt_ids"], made["completion_ids"]], dim=1),
                torch.cat([made["prompt_mask"], made["completion_mask"]], dim=1),
                made["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size,
            )[0]
        return logps

    def _send_telemetry(self) -> None:
        """Nothing leaves a node but its updates: TRL would report model and hardware to the Hub."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint needs no README."""


def check_trl() -> None:
    """Raises SettingsError when TRL is not what this module was written for."""
    differences = []
    if trl.__version__.rpartition(".")[0] != TRL_SERIES:
        differences.append(f"its version is not {TRL_SERIES}.*")
    if "rollout_func" not in inspect.signature(GRPOTrainer.__init__).parameters:
        differences.append("GRPOTrainer takes no rollout_func")
    for method, parts in _READ.items():
        source = inspect.getsource(getattr(GRPOTrainer, method, GRPOTrainer.__init__))
        differences += [
            f"GRPOTrainer.{method} does not use {part}" for part in parts if part not in source
        ]
    if differences:
        raise SettingsError(
            f"TRL {trl.__version__} does not have the surface that grpo rounds were written for: "
            f"{'; '.join(differences)}. Install trl=={TRL_SERIES}.*, or set EDGE_LEARNING__METHOD "
            "to sft."
        )


def use_server(trainer: Any, publish: Callable[[], None]) -> None:
    """`publish` is called before the first rollouts of each optimizer step."""
    # On an answer without a reward TRL logs the answer.
    logging.getLogger("trl.trainer.grpo_trainer").setLevel(logging.ERROR)
    trainer.use_vllm, trainer.vllm_mode = True, "server"
    trainer.vllm_generation = _Publisher(publish)
    trainer._last_loaded_step = -1
