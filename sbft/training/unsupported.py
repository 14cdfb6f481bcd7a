"""What a trainer can be asked for and sbft does otherwise: refused in a sentence, or said once, and never passed over."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from sbft.optim.base import TokenOptimizer
from sbft.optim.state import saved_clock
from sbft.training.arguments import ArgumentError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


def inner(optimizer: Any) -> Any:
    """An optimizer, out of accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


class AskedFor(_Base):
    """Put before a `Trainer`: optimizers that were passed in, searches over settings, and checkpoints of other trainers."""

    args: Any
    model: Any

    def _is_overridden(self, name: str) -> bool:
        raise NotImplementedError  # abstract

    def _refuse_what_is_asked(self) -> None:
        """Refuse what would have no effect, or none that a token optimizer can serve."""
        self.args.check()
        if self.args.token_optimizer is None:
            return
        if self.is_deepspeed_enabled:
            raise ArgumentError(
                "DeepSpeed keeps weights, gradients and optimizer in a form of its own, which token_optimizer="
                f"{self.args.token_optimizer!r} cannot update. Leave DeepSpeed out (to shard a model, load it with "
                "from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N))), or set token_optimizer=None."
            )
        given = self.args.given_optimizer_settings()
        if given and (self.optimizer is not None or self.optimizer_cls_and_kwargs is not None):
            name, value = next(iter(given.items()))
            raise ArgumentError(
                f"{name}={value!r} has no effect, because an optimizer was passed to the trainer. Give it to that optimizer, "
                "or leave the optimizer out."
            )

    def _may_be_others_optimizer(self) -> bool:
        """Whether something else than a token optimizer may update the weights, as far as is known before training."""
        if self.optimizer is not None:
            return not isinstance(inner(self.optimizer), TokenOptimizer)
        if self.optimizer_cls_and_kwargs is not None:
            optimizer_class = self.optimizer_cls_and_kwargs[0]
            return not (isinstance(optimizer_class, type) and issubclass(optimizer_class, TokenOptimizer))
        return self._is_overridden("create_optimizer")

    def _look_at_optimizer(self) -> None:
        """Say once what of the arguments an optimizer cannot do that was passed in, or that a subclass made."""
        optimizer = inner(self.optimizer)
        if not isinstance(optimizer, TokenOptimizer):
            if self.args.token_optimizer is not None:
                self._say_theirs(optimizer)
            return
        if optimizer.counts_tokens:
            raise ArgumentError(
                "The optimizer that was passed in counts tokens by itself (count_tokens), and the trainer does so too. Call "
                "remove() on its handle."
            )
        needed = [
            f"{name}={getattr(self.args, name)}"
            for name, least in (("max_grad_norm", 0), ("gradient_accumulation_steps", 1))
            if getattr(self.args, name) > least
        ]
        if needed and (optimizer.releases_gradients or self.args.gradient_release):
            raise ArgumentError(
                f"{' and '.join(needed)} would have no effect: the gradients of the optimizer passed in are released within "
                "backward. Call remove() on the handle of release_gradients(), if there is one, and set gradient_release=False."
            )

    def _say_theirs(self, optimizer: Any) -> None:
        narrow = any(p.dtype == torch.bfloat16 for group in optimizer.param_groups for p in group["params"])
        lost = "gradients are not released and averages go by steps"
        if narrow:
            lost += ", and bfloat16 weights are rounded to the nearest, which loses small updates"
        logger.warning(
            f"token_optimizer={self.args.token_optimizer!r}, but the optimizer is the {type(optimizer).__name__} that was "
            f"passed in or made by create_optimizer: {lost}. Set token_optimizer=None to say so."
        )

    def _hp_search_setup(self, trial: Any) -> None:
        """As in `Trainer`, by now with the model of this training; what a trial sets is checked as what is set at first is."""
        super()._hp_search_setup(trial)
        self.args.check()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in `Trainer`; of a checkpoint of another optimizer, whose averages go by steps, only the schedule is taken."""
        optimizer = inner(self.optimizer)
        saved = None if checkpoint is None else Path(checkpoint) / OPTIMIZER_NAME
        if saved is None or not isinstance(optimizer, TokenOptimizer) or not saved.is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(saved, map_location="cpu", weights_only=True, mmap=True)
        if saved_clock(state) is not None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        logger.warning(
            f"{checkpoint} was saved with an optimizer of another library, and training goes on with "
            f"{type(optimizer).__name__}: weights, steps and the place in the learning rate's schedule are resumed; its "
            "averages and the count of tokens begin anew, and learning_rate and the schedule are those of now. To resume the "
            "optimizer too, set token_optimizer=None and optim as it was."
        )
        if (schedule := Path(str(checkpoint)) / SCHEDULER_NAME).is_file():
            _advance(self.lr_scheduler, torch.load(schedule, map_location="cpu", weights_only=True))


def _advance(scheduler: Any, saved: Mapping[str, Any]) -> None:
    """Put a schedule at the step where another was saved, with its own rates."""
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR) or "last_epoch" not in saved:
        return  # of those that follow a metric
    scheduler.last_epoch, scheduler._step_count = saved["last_epoch"], saved["_step_count"]
    rates = scheduler.get_lr()
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
