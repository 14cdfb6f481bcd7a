"""Evaluation within training: no logits are made where only the loss is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from sbft.training.batches.batch_counts import targets_of
from sbft.training.generation_config import generator_of
from sbft.training.plain_attention import fast_attention
from sbft.training.watch.labels import LabelWatch

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class PredictionStep(_Base):
    """Put before `LogitsFreeLoss`: `eval_loss` needs little memory, and batches without labels stay out of it."""

    model: Any
    warn_once: Callable[[str], None]
    _labels: LabelWatch
    _takes_logits_free_loss: Callable[[Any], bool]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As in `Trainer`; makes no logits where only the loss is needed."""
        if prediction_loss_only and targets_of(inputs, of_next=generator_of(self.model) is not None) == 0:
            if self.accelerator.num_processes == 1:
                self._labels.leave_out_of_evaluation()
                return None, None, None  # a loss of zero would lower the mean, and NaN would spoil it
            self.warn_once(
                "Some evaluation batches have no label. With several processes each of them counts as a loss of zero in "
                "eval_loss, which is then too low: leave such examples out of the evaluation data."
            )
        if not prediction_loss_only or not self._takes_logits_free_loss(inputs):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), fast_attention(inputs):
            loss: Any = self.compute_loss(model, inputs)
            return loss.detach(), None, None
