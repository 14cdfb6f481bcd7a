"""Optimizers that were passed to the trainer or made by a subclass, and checkpoints that another optimizer saved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from sbft.optim.base import TokenOptimizer
from sbft.optim.state import saved_clock
from sbft.training.arguments import ArgumentError
from sbft.training.token_optimizers import inner_optimizer

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ForeignOptimizers(_Base):
    """Put before a `Trainer`: works with optimizers that are not the one its arguments name, and says what is lost."""

    args: Any
    model: Any
    _is_overridden: Callable[[str], bool]

    def _may_have_foreign_optimizer(self) -> bool:
        """Whether something other than a token optimizer may update the weights, as far as is known before training."""
        if self.optimizer is not None:
            return not isinstance(inner_optimizer(self.optimizer), TokenOptimizer)
        if self.optimizer_cls_and_kwargs is not None:
            optimizer_class = self.optimizer_cls_and_kwargs[0]
            return not (isinstance(optimizer_class, type) and issubclass(optimizer_class, TokenOptimizer))
        return self._is_overridden("create_optimizer")

    def _check_optimizer(self) -> None:
        """Warn if the optimizer is no token optimizer although the arguments name one.

        Raises:
            ArgumentError: if a token optimizer that was passed in does not match the arguments.
        """
        optimizer = inner_optimizer(self.optimizer)
        if not isinstance(optimizer, TokenOptimizer):
            if self.args.token_optimizer is not None:
                self._warn_of_foreign_optimizer(optimizer)
            return
        if optimizer.counts_tokens:
            raise ArgumentError(
                "The optimizer that was passed in counts tokens by itself (count_tokens), and the trainer counts them too. "
                "Call remove() on the handle of count_tokens()."
            )
        needing_gradients = [
            f"{name}={getattr(self.args, name)}"
            for name, off in (("max_grad_norm", 0), ("gradient_accumulation_steps", 1))
            if getattr(self.args, name) > off
        ]
        if needing_gradients and (optimizer.releases_gradients or self.args.gradient_release):
            raise ArgumentError(
                f"{' and '.join(needing_gradients)} would have no effect: the optimizer that was passed in releases "
                "its gradients within backward. Call remove() on the handle of release_gradients(), if there is one, and set "
                "gradient_release=False."
            )

    def _warn_of_foreign_optimizer(self, optimizer: Any) -> None:
        narrow = any(p.dtype == torch.bfloat16 for group in optimizer.param_groups for p in group["params"])
        lost = "gradients are not released and averages are measured in steps"
        if narrow:
            lost += ", and bfloat16 weights are rounded to nearest, which loses small updates"
        logger.warning(
            f"token_optimizer={self.args.token_optimizer!r}, but the optimizer is the {type(optimizer).__name__} that was "
            f"passed in or made by create_optimizer: {lost}. Set token_optimizer=None to say so."
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in `Trainer`; from a checkpoint of another optimizer only the schedule is resumed, not the averages per step."""
        optimizer = inner_optimizer(self.optimizer)
        saved = None if checkpoint is None else Path(checkpoint) / OPTIMIZER_NAME
        if saved is None or not isinstance(optimizer, TokenOptimizer) or not saved.is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(saved, map_location="cpu", weights_only=True, mmap=True)
        if saved_clock(state) is not None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        logger.warning(
            f"{checkpoint} was saved with an optimizer of another library, and training continues with "
            f"{type(optimizer).__name__}. Weights, steps and the position in the learning rate schedule are resumed; "
            "averages and the count of tokens start from zero. learning_rate and the schedule are those of the current "
            "arguments. To resume the optimizer too, set token_optimizer=None and optim as it was."
        )
        if (schedule := Path(str(checkpoint)) / SCHEDULER_NAME).is_file():
            _advance(self.lr_scheduler, torch.load(schedule, map_location="cpu", weights_only=True))


def _advance(scheduler: Any, saved: Mapping[str, Any]) -> None:
    """Move a schedule, which keeps its own rates, to the step at which another was saved."""
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR) or "last_epoch" not in saved:
        return  # such schedules follow a metric, not the step
    scheduler.last_epoch, scheduler._step_count = saved["last_epoch"], saved["_step_count"]
    rates = scheduler.get_lr()
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
