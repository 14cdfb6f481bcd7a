"""The progress of training: a bar on a terminal, else a line per logged step."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sbft.native.memory import current_peak_bytes
from sbft.native.sizes import gib

_REDRAW_EVERY_S = 0.2


class TrainingProgress(TrainerCallback):
    """Shows loss, tokens per second, peak memory and the time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._loss: float | None = None
        self._tokens: tuple[int, float] = (0, 0.0)
        self._tokens_per_s: float | None = None
        self._began = 0.0
        self._first_step = 0
        self._drawn = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        if not state.is_world_process_zero:
            return
        self._began, self._first_step, self._loss = time.perf_counter(), state.global_step, None
        # -1: a resumed run starts at the checkpoint's token count, which is not known yet.
        self._tokens, self._tokens_per_s = (0 if state.global_step == 0 else -1, self._began), None
        if self._console.is_terminal:
            # The bar gets what the figures leave of the line: about ten of 80 columns.
            columns = (
                BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
            )
            self._bar = Progress(*columns, console=self._console, expand=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, figures="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar."""
        now = time.perf_counter()
        if self._bar is not None and (now - self._drawn > _REDRAW_EVERY_S or state.global_step == state.max_steps):
            self._drawn = now
            self._bar.update(self._task, completed=state.global_step, figures=self._figures(args, state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note the loss; without a bar, print a line."""
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        self._loss = logs["loss"]
        self._measure_speed(int(logs["tokens_seen"]))
        if self._bar is None:
            figures = self._figures(args, state)
            self._console.print(f"step {state.global_step}/{state.max_steps}  {figures}", markup=False, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Remove the bar, if there is one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _measure_speed(self, tokens: int) -> None:
        before, since = self._tokens
        now = time.perf_counter()
        if before >= 0:
            self._tokens_per_s = (tokens - before) / (now - since)
        self._tokens = tokens, now

    def _figures(self, args: TrainingArguments, state: TrainerState) -> str:
        elapsed = time.perf_counter() - self._began
        done = state.global_step - self._first_step
        left = elapsed / done * (state.max_steps - state.global_step) if done else 0.0
        figures = [] if self._loss is None else [f"loss {self._loss:.3f}"]
        if self._tokens_per_s is not None:
            figures.append(f"{self._tokens_per_s:.0f} tokens/s")
        figures += [f"peak {gib(current_peak_bytes(args.device))}", f"{_clock(left)} left"]
        return "  ".join(figures)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
