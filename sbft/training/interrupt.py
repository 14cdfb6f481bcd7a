"""Ctrl-C between two steps: never in the middle of one, where some parameters are already updated and others not."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopBetweenSteps(TrainerCallback):
    """While entered, Ctrl-C and SIGTERM let the step end, save a checkpoint and stop; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
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
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask the trainer for a checkpoint and an end, if a signal came during the step."""
        if self.requested and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        return control
