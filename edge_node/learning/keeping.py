"""Keeps a round's model near the base on the base's own samples; the trainers of sft rounds.

In: rows of samples, and the base's last hidden states of them. Out: what is added to the loss of an
optimizer step: a weight times the KL divergence from the base, mean over every token of the step's
samples (knowledge distillation, arXiv:1503.02531, at temperature 1, with the base as teacher). An
sft round has the samples in its batches, a grpo round has batches of its own (`Keeping`).
Guarantees: the teacher is the base itself, whatever release the round starts from, because its
logits are made from the stored states. No second model is loaded: head and embeddings are frozen,
so the student's head is the base's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from edge_node.learning.batches import TokenRow
from edge_node.learning.parts import cut
from edge_node.learning.teacher import head_logits

CHUNK_LOGITS = 1 << 25
"""Logits that are held at once, of one model; 128 MiB."""
KL_BASE = "kl_base"
"""What the trainers' logs call the mean KL(base || model) over the samples, nats a token."""
OWN = -1
"""Sample of a row that is none, but an own example."""


class RoundTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's, silent, and with a bound on what a forward pass holds."""

    batch_tokens: int | None = None
    """Most tokens of a forward pass; None: a step is one pass."""

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The step's loss; its gradient is in the factors.

        `num_items_in_batch` counts the answer tokens of the whole step, and `compute_loss` divides
        the sum over a part by it. So the parts add up to the undivided step (parts.py). Gradient
        accumulation of the Trainer would need the same number of rows in each part.
        """
        parts = [inputs] if self.batch_tokens is None else cut(inputs, self.batch_tokens)
        losses = [
            super(RoundTrainer, self).training_step(model, part, num_items_in_batch)
            for part in parts
        ]
        return torch.stack(losses).sum()

    def _send_telemetry(self) -> None:
        """Nothing leaves a node but its updates: TRL would report model and hardware to the Hub."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint needs no README."""


class KeepingTrainer(RoundTrainer):
    """Adds `kl` times the divergence from the base; its batches are those of `KeepingCollator`.

    The loss of some rows of a batch is their part of the batch's loss: each sum is divided by the
    tokens of the whole batch.
    """

    def __init__(
        self, *args: Any, kl: float, states: Sequence[torch.Tensor], **kwargs: Any
    ) -> None:
        """states: the base's last hidden states of every sample, [tokens, hidden]."""
        super().__init__(*args, **kwargs)
        self._kl = kl
        self._states = states

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "sample" not in self._signature_columns:  # others are taken out of the rows
            self._signature_columns.append("sample")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """One pass over the own rows and one over the samples: they differ in length."""
        sample, tokens = inputs.pop("sample"), inputs.pop("sample_tokens")
        loss = torch.zeros((), device=sample.device)
        if (own := sample == OWN).any():
            loss = loss + super().compute_loss(model, _rows(inputs, own), *args, **kwargs)
        if (~own).any():
            states = [self._states[number] for number in sample[~own].tolist()]
            divergence = _divergence(self, model, _rows(inputs, ~own), states) / tokens[0]
            loss = loss + self._kl * divergence
            _log(self, divergence)
        return loss


class Keeping:
    """What a grpo round's trainer adds to each optimizer step."""

    def __init__(
        self,
        batches: Sequence[Sequence[TokenRow]],
        *,
        kl: float,
        states: Sequence[torch.Tensor],
        pad_token_id: int,
        batch_tokens: int | None,
    ) -> None:
        """batches: samples, one batch a step. states: as in KeepingTrainer.

        batch_tokens: most tokens of a forward pass; None: a batch is one pass.
        """
        self._batches = batches
        self._kl = kl
        self._states = states
        self._collate = KeepingCollator(pad_token_id)
        self._batch_tokens = batch_tokens

    def add(self, trainer: Any, model: Any) -> torch.Tensor:
        """Adds the gradient of the step under way, part by part; its part of the loss.

        It goes back by itself, after the step's own passes: their memory is free again.
        """
        rows = self._batches[trainer.state.global_step]
        batch = self._collate([vars(row) for row in rows])
        parts = [batch] if self._batch_tokens is None else cut(batch, self._batch_tokens)
        loss = torch.zeros((), device=trainer.accelerator.device)
        for part in parts:
            part = {name: values.to(loss.device) for name, values in part.items()}
            states = [self._states[number] for number in part["sample"].tolist()]
            divergence = _divergence(trainer, model, part, states) / part["sample_tokens"][0]
            trainer.accelerator.backward(self._kl * divergence)
            _log(trainer, divergence)
            loss += self._kl * divergence.detach()
        return loss


def _divergence(
    trainer: Any, model: Any, rows: Mapping[str, torch.Tensor], states: Sequence[torch.Tensor]
) -> torch.Tensor:
    """KL(base || model) over rows of samples, nats, sum over the tokens; `states` of each row."""
    student = trainer.accelerator.unwrap_model(model).get_base_model()
    with trainer.accelerator.autocast():
        return kl_to_base(
            student,
            rows["input_ids"],
            rows["attention_mask"],
            torch.cat(list(states)).to(rows["input_ids"].device),
        )


def _log(trainer: Any, divergence: torch.Tensor) -> None:
    # The log has the mean of this list; what a step's parts add up to is one entry of it.
    seen = trainer._metrics["train"][KL_BASE]
    seen[:] = [sum(seen) + divergence.item()]


class KeepingCollator:
    """Rows of one batch, padded as TRL pads them.

    `sample` says which sample a row is, or OWN. `sample_tokens` says how many tokens of samples the
    batch has. Both are int64 [rows].
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad = DataCollatorForLanguageModeling(pad_token_id)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._pad(rows)
        batch["sample"] = torch.tensor(
            [OWN if row["sample"] is None else row["sample"] for row in rows]
        )
        tokens = sum(len(row["input_ids"]) for row in rows if row["sample"] is not None)
        batch["sample_tokens"] = torch.full((len(rows),), tokens)
        return batch


def kl_to_base(
    student: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, states: torch.Tensor
) -> torch.Tensor:
    """KL(base || student), nats, sum over the tokens; a scalar with a gradient.

    Args:
        student: a causal language model whose head is the base's, frozen.
        input_ids, attention_mask: int64 [samples, longest], padded on the right.
        states: the base's last hidden states of all tokens, sample after sample, [tokens, hidden].
    """
    hidden = student.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state
    return _KlOfStates.apply(hidden[attention_mask.bool()], states, student)


def _rows(batch: Mapping[str, torch.Tensor], chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    """These rows, without the padding that none of them needs."""
    length = int(batch["attention_mask"][chosen].sum(1).max())
    return {name: values[chosen][:, :length] for name, values in batch.items()}


class _KlOfStates(torch.autograd.Function):  # type: ignore[misc]
    """Sum of KL(base || student) from both models' last hidden states, through the one frozen head.

    The gradient to the student's states is made in the forward pass, chunk by chunk, so that the
    logits of all tokens are never there at once (a vocabulary is large: 600 MB for 1,000 tokens).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, states: Any, model: Any) -> torch.Tensor:
        size = max(1, CHUNK_LOGITS // model.get_output_embeddings().weight.shape[0])
        total, gradients = torch.zeros((), device=hidden.device), []
        for mine, base in zip(hidden.split(size), states.split(size), strict=True):
            mine = mine.detach().requires_grad_()
            with torch.enable_grad():
                student = log_softmax(head_logits(model, mine), -1)
                with torch.no_grad():
                    teacher = log_softmax(head_logits(model, base), -1)
                part = kl_div(student, teacher, reduction="sum", log_target=True)
            gradients += torch.autograd.grad(part, mine)
            total += part.detach()
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> tuple[Any, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None
