"""Ctrl-C and SIGTERM between two steps: never in the middle of one, where only some parameters are already updated."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopBetweenSteps(TrainerCallback):
    """While entered, Ctrl-C and SIGTERM let the step end, save a checkpoint and stop; a second one stops at once.

    Of several ranks, all stop after the same step as soon as one of them was told to.

    Attributes:
        signal: what this rank, or another, was told to stop by; 0 if by nothing.
    """

    def __init__(self) -> None:
        self.signal = 0
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

    @property
    def requested(self) -> bool:
        """Whether somebody told the run to stop."""
        return self.signal != 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Not `requested`: another rank may have told this one before its own signal came.
        if self._heard:
            raise KeyboardInterrupt(number)
        self._heard, self.signal = True, number

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask the trainer for a checkpoint and an end, if a signal came during the step."""
        # One that comes while the ranks agree is kept for the next step.
        if state.global_step < state.max_steps and (agreed := self._agreed(args)):
            self.signal = agreed
            control.should_save = True
            control.should_training_stop = True
            # Where only the best are saved, the trainer would take the wish to save back after an evaluation.
            if args.save_strategy == SaveStrategy.BEST:
                control.should_evaluate = False
        return control

    def _agreed(self, args: TrainingArguments) -> int:
        """The signal that any rank was sent, 0 if none was."""
        if args.world_size == 1:
            return self.signal
        asked = torch.tensor(self.signal, device=args.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return int(asked)
