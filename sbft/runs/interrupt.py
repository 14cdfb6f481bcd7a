"""Ctrl-C and SIGTERM take effect between two steps: within a step, only some of the parameters are updated yet."""

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

    With several ranks, all stop after the same step as soon as one of them gets the signal.

    Attributes:
        signal: the signal that this rank or another got; 0 if none did.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._heard = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopBetweenSteps:
        # Only the main thread may set handlers. A run in another thread keeps those of its program.
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
        """Whether the run was asked to stop."""
        return self.signal != 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Not `requested`, which another rank may have set before this one got its own signal.
        if self._heard:
            raise KeyboardInterrupt(number)
        self._heard, self.signal = True, number

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask the trainer for a checkpoint and an end, if a signal came during the step."""
        # A signal that comes while the ranks agree takes effect after the next step.
        if state.global_step < state.max_steps and (agreed := self._agreed(args)):
            self.signal = agreed
            control.should_save = True
            control.should_training_stop = True
            # If only the best checkpoints are saved, an evaluation would clear should_save.
            if args.save_strategy == SaveStrategy.BEST:
                control.should_evaluate = False
        return control

    def _agreed(self, args: TrainingArguments) -> int:
        """The signal that any rank was sent, 0 if none was."""
        if args.world_size == 1:
            return self.signal
        request = torch.tensor(self.signal, device=args.device)
        torch.distributed.all_reduce(request, op=torch.distributed.ReduceOp.MAX)
        return int(request)
