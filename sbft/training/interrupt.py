"""Ctrl-C between two steps: never in the middle of one, where some parameters are already updated and others not."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopBetweenSteps(TrainerCallback):
    """While entered, Ctrl-C and SIGTERM let the step end, save a checkpoint and stop; a second one stops at once.

    Of several ranks, all stop after the same step as soon as one of them was told to.
    """

    def __init__(self) -> None:
        self.requested = False
        self._heard = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopBetweenSteps:
        # Only the main thread may set handlers; a run inside another thread keeps its program's own.
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Not `requested`: another rank may have told this one before its own signal came.
        if self._heard:
            raise KeyboardInterrupt
        self._heard = self.requested = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask the trainer for a checkpoint and an end, if a signal came during the step."""
        if state.global_step < state.max_steps and self._agreed(args):
            self.requested = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def _agreed(self, args: TrainingArguments) -> bool:
        """Whether any rank is asked to stop."""
        if args.world_size == 1:
            return self.requested
        asked = torch.tensor(int(self.requested), device=args.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked)
