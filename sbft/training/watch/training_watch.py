"""Watches a run: warns once of a loss that jumps, and once of weights that no longer move."""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sbft.training.token_optimizers import inner_optimizer
from sbft.training.watch.loss_jump import LossWatch, message_of_jump
from sbft.training.watch.movement import (
    SAMPLE_EVERY,
    SAMPLES,
    MovementWatch,
    is_stall,
    message_of_stall,
    transformers_model,
)

logger = logging.getLogger(__name__)

# Losses and counts stay on the device and are read together, so that the host waits for a GPU only once in so many steps.
_READ_EVERY = 8

# As a share of the first loss. Weights that have moved and stop after the loss has fallen this far have learned what there was
# to learn: small gradients make small updates. Weights that never moved are stuck even if the loss falls. With Adafactor at
# 1e-4, rounded to nearest, SmolLM2-135M loses 93 % of its movement, but weights near zero alone still halve the loss in 30
# steps.
_LEARNED_BELOW = 0.5


class TrainingWatch(TrainerCallback):
    """Warns once when the loss jumps and once when the weights no longer move, and names the likely cause.

    It changes neither results nor random state. The trainer passes it the loss of every backward (`add_loss`) and says which
    steps made no update (`leave_step_out`). `trainer.remove_callback(TrainingWatch)` turns it off. Only rank 0 watches, and
    only its own loss. A resumed run may warn again.
    """

    def __init__(self) -> None:
        self._begin(LossWatch(), None, None)

    def _begin(self, losses: LossWatch, movement: MovementWatch | None, began_at: float | None) -> None:
        self._losses = losses
        self._movement = movement
        self._began_at = began_at
        self._step_loss: Tensor | None = None
        self._tokens = 0
        self._left_out = False
        self._steps = 0
        # For every step since the last reading: its number, its tokens, its loss, and how many sampled weights it changed.
        self._unread: list[tuple[int, int, Tensor, Tensor | None]] = []
        self._changed: deque[int] = deque(maxlen=SAMPLES)
        self._have_moved = began_at is not None  # a resumed run may already have learned everything
        self._warned_of_jump = self._warned_of_stall = False

    # Called by the trainer

    def add_loss(self, loss: Tensor, tokens: int) -> None:
        """Add one backward's share of the current step's loss, which is not read here.

        Args:
            loss: shape (), detached; the shares of a step add up to its mean over tokens.
            tokens: of the whole step.
        """
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        self._tokens = tokens

    def leave_step_out(self) -> None:
        """The current step changes no weight, on purpose."""
        self._left_out = True

    # Events

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Choose the weights to sample."""
        assert model is not None
        logged = [float(entry["loss"]) for entry in state.log_history if "loss" in entry]  # of a resumed run
        movement = MovementWatch(model) if state.is_world_process_zero else None
        self._begin(LossWatch(_loss_of_a_guess(model)), movement, logged[0] if logged else None)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Copy the sampled weights before forward, since released gradients update them within backward."""
        self._step_loss, self._left_out = None, False
        if self._movement is None or self._warned_of_stall or self._steps % SAMPLE_EVERY:
            return
        if _is_near_its_peak(inner_optimizer(optimizer)):
            self._movement.before_step()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Compare them with the copy, and evaluate the results every few steps."""
        if self._movement is None or self._step_loss is None:
            return
        if self._left_out:
            self._movement.discard()
        else:
            self._steps += 1
            self._unread.append((state.global_step, self._tokens, self._step_loss, self._movement.after_step()))
        # Steps are skipped rarely, and more of them may soon end the run.
        if self._left_out or len(self._unread) == _READ_EVERY:
            self._read(inner_optimizer(optimizer))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Evaluate the last steps too."""
        self._read(inner_optimizer(optimizer))

    def _read(self, optimizer: torch.optim.Optimizer) -> None:
        unread, self._unread = self._unread, []
        if not unread:
            return
        values = [loss for *_, loss, _ in unread] + [changed for *_, changed in unread if changed is not None]
        device = values[0].device
        read = torch.stack([value.to(device, torch.float32).reshape(()) for value in values]).tolist()
        for (step, tokens, *_), loss in zip(unread, read, strict=False):
            self._losses.add(step, loss, tokens)
        self._changed.extend(int(changed) for changed in read[len(unread) :])
        last_step = unread[-1][0]
        if not self._warned_of_jump and (jump := self._losses.jump()) is not None:
            self._warned_of_jump = True
            logger.warning(message_of_jump(jump, optimizer, _peak_rate(optimizer), self._losses.tokens_per_step))
        if not self._warned_of_stall and self._is_stalled(optimizer):
            self._warned_of_stall = True
            assert self._movement is not None
            logger.warning(
                message_of_stall(
                    self._share,
                    last_step,
                    optimizer,
                    _peak_rate(optimizer),
                    self._movement.bfloat16,
                    self._movement.on_grid,
                )
            )

    def _is_stalled(self, optimizer: torch.optim.Optimizer) -> bool:
        assert self._movement is not None
        if len(self._changed) < SAMPLES or not self._movement.elements:
            return False
        if not is_stall(self._share, optimizer, self._movement.bfloat16, self._movement.on_grid):
            self._have_moved = True
            return False
        first = self._losses.first_loss if self._began_at is None else self._began_at
        learned = first is not None and self._losses.recent_loss < _LEARNED_BELOW * first
        return not (self._have_moved and learned)

    @property
    def _share(self) -> float:
        assert self._movement is not None
        return sum(self._changed) / (SAMPLES * self._movement.elements)


def _loss_of_a_guess(model: nn.Module) -> float | None:
    inner = transformers_model(model)
    size = None if inner is None else inner.config.get_text_config().to_dict().get("vocab_size")
    return None if size is None else math.log(size)


def _peak_rate(optimizer: torch.optim.Optimizer) -> float:
    return max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)


def _is_near_its_peak(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the learning rate is at least half its peak. During warm-up and decay, updates are small."""
    rate, peak = max(float(group["lr"]) for group in optimizer.param_groups), _peak_rate(optimizer)
    return rate > 0 and 2 * rate >= peak
