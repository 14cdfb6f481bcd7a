"""Tells the optimizer how many tokens each step holds, or how many examples where its batches hold no tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from sbft.models.limits import fitting_batches
from sbft.optim.base import TokenOptimizer
from sbft.optim.counting import IN_EXAMPLES, Count
from sbft.training.batches.batch_counts import CountingCollator, count_in
from sbft.training.batches.packing_probe import warn_of_dropped_positions

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class CountedBatches(_Base):
    """Put before a `Trainer`: counts the tokens of a step, or its examples where it holds no tokens, for the optimizer.

    A batch that is a list of examples, such as the prompts of TRL's GRPO, is counted after the trainer has made the inputs from
    it, because these also hold the completions.
    """

    args: Any
    model: Any
    _step_tokens: int
    _in_training_step: bool
    _token_optimizer: TokenOptimizer | None
    _counts_prepared = False
    _warned_of_examples = False

    def get_train_dataloader(self) -> Any:
        """As in `Trainer`; its batches are counted while they are on the host."""
        loader: Any = super().get_train_dataloader()
        plain = getattr(loader, "base_dataloader", loader)  # inside accelerate's
        if isinstance(plain, DataLoader):
            plain.collate_fn = CountingCollator(fitting_batches(plain.collate_fn, self.model))
            warn_of_dropped_positions(self.model, self.train_dataset)
        return loader

    def _count_step(self, batches: list[Any]) -> None:
        """Count the batches of the coming step; those that are no inputs yet are counted when they are prepared."""
        self._step_tokens = 0
        self._counts_prepared = not all(isinstance(batch, Mapping) or _is_tensors(batch) for batch in batches)
        if not self._counts_prepared:
            self._add_to_step([count_in(batch) for batch in batches])

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As in `Trainer`."""
        prepared = super()._prepare_inputs(inputs)
        if self._in_training_step and self._counts_prepared:
            self._add_to_step([count_in(prepared)])
        return prepared

    def _add_to_step(self, counts: list[Count]) -> None:
        tokens = sum(count.number for count in counts)
        if self.accelerator.num_processes > 1:
            tokens = int(self.accelerator.gather(torch.tensor(tokens, device=self.args.device)).sum())
            tokens //= self.get_tp_size()  # the ranks of a tensor parallel group have the same examples
        self._step_tokens += max(tokens, 1)
        optimizer = self._token_optimizer
        if optimizer is None:
            return
        optimizer.tokens_per_step = self._step_tokens
        if not (self._warned_of_examples or all(count.in_tokens for count in counts)):
            self._warned_of_examples = True
            if optimizer.needs_tokens:
                logger.warning(f"token_optimizer {type(optimizer).__name__}: {IN_EXAMPLES}")


def _is_tensors(batch: Any) -> bool:
    return isinstance(batch, Tensor) or (
        isinstance(batch, (list, tuple)) and len(batch) > 0 and all(isinstance(part, Tensor) for part in batch)
    )
