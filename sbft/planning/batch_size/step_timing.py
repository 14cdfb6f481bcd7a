"""Times training steps of a recipe at one batch size after another, on one model whose weights stay unchanged."""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from sbft.data.collate import IGNORED_LABEL, Collator
from sbft.errors import TrainingError
from sbft.native.memory import PeakMemory, optimizer_state_bytes
from sbft.planning.batch_size.curve import Timed
from sbft.planning.batch_size.flops import training_flops
from sbft.recipe import Recipe
from sbft.runs.build import training_arguments
from sbft.runs.failures import is_out_of_memory
from sbft.training.trainer import SmallBatchTrainer

_WARM_UP = 2
"""Steps that are not timed: the first makes the optimizer's state and compiles, the second is the first to reuse it."""
_STEPS, _LONG_STEPS = 5, 3
"""Minimum number of timed steps. Long steps need fewer, because noise evens out within each."""
_BATCHES_AN_EPOCH = 64
_DIFFERENT_EXAMPLES = 64
"""All of one length; more of them would change neither time nor memory."""
# Settings of the recipe that do not apply: timing ends by the clock, saves nothing, and the learning rate is 0.
_LEFT_OUT = frozenset({
    "num_train_epochs", "auto_find_batch_size", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "save_steps",
    "save_total_limit", "logging_steps", "logging_first_step", "logging_dir", "run_name",
})  # fmt: skip
_SETTINGS = {
    "gradient_accumulation_steps": 1,
    "max_steps": 10**9,
    # Steps do all their work but change no weight: one loaded model serves all sizes, and no loss diverges.
    "learning_rate": 0.0,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
}


def longest_examples(examples: Dataset) -> Dataset:
    """Examples that are padded to the same length as the longest, so that all batches have one width and little padding.

    Args:
        examples: as `sbft.data.format.format_dataset` makes them.
    """
    lengths = pc.list_value_length(examples.with_format("arrow")[:]["input_ids"]).to_numpy()
    padded = -(-lengths // Collator.pad_to_multiple_of)
    return examples.select((padded == padded.max()).nonzero()[0][:_DIFFERENT_EXAMPLES])


@dataclass
class StepTimer:
    """Times training steps of a recipe at any batch size."""

    recipe: Recipe
    """Resolved."""
    model: PreTrainedModel
    """As `prepare_model` returns it; its weights are not changed."""
    examples: Dataset
    """Examples for the batches, repeated as often as needed."""
    pad_token_id: int
    seconds: float = 2.0
    """Minimum time to measure each size."""

    @property
    def tokens_per_example(self) -> float:
        """Mean length of the examples."""
        return fmean(map(len, self.examples["input_ids"]))

    def __call__(self, batch_size: int) -> Timed | None:
        """Train briefly with an update in every step, and discard the result.

        Returns:
            The measurement; None if memory ran out.

        Raises:
            SbftError: if the recipe cannot be trained, or its loss is not finite.
        """
        result = None
        try:
            with tempfile.TemporaryDirectory() as folder:
                result = self._train(batch_size, Path(folder))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # From here on, nothing refers to the trainer any more, nor to the tensors of a failed step.
        self.model.zero_grad(set_to_none=True)
        if torch.accelerator.is_available():  # on a CPU, `PeakMemory` does this when it starts
            gc.collect()
            torch.accelerator.empty_cache()
        return result

    def _train(self, batch_size: int, folder: Path) -> Timed:
        stopwatch = _Stopwatch(self.seconds)
        trainer = SmallBatchTrainer(
            model=self.model,
            args=training_arguments(self._settings(batch_size), folder),
            train_dataset=self._repeated(batch_size),
            data_collator=Collator(self.pad_token_id),
            callbacks=[stopwatch],
        )
        trainer.remove_callback(PrinterCallback)
        with PeakMemory(trainer.args.device) as peak:
            trainer.train()
        optimizer = trainer.optimizer
        assert optimizer is not None
        if trainer.skipped_steps:
            raise TrainingError(
                f"The loss of the untrained model was not finite in {trainer.skipped_steps} of "
                f"{trainer.state.global_step} steps at batch size {batch_size}, so there was no backward pass to time. "
                "Check the model and the longest examples."
            )
        return Timed(
            batch_size=batch_size,
            tokens_per_step=trainer.tokens_seen / trainer.state.global_step,
            step_s=median(stopwatch.step_seconds),
            steps=len(stopwatch.step_seconds),
            peak_bytes=peak.peak_bytes,
            baseline_bytes=peak.baseline_bytes,
            fixed_bytes=optimizer_state_bytes(optimizer) + self._kept_gradient_bytes(),
            flops_per_step=self._flops(batch_size),
        )

    def _settings(self, batch_size: int) -> Recipe:
        kept = {name: value for name, value in self.recipe.training.items() if name not in _LEFT_OUT}
        return self.recipe.model_copy(
            update={"training": {**kept, **_SETTINGS, "per_device_train_batch_size": batch_size}}
        )

    def _repeated(self, batch_size: int) -> Dataset:
        count = len(self.examples)
        return self.examples.select([index % count for index in range(batch_size * _BATCHES_AN_EPOCH)])

    def _kept_gradient_bytes(self) -> int:
        if self.recipe.optimizer.gradient_release:
            return 0
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    def _flops(self, batch_size: int) -> float | None:
        # The first token is not predicted.
        labels = fmean(sum(label != IGNORED_LABEL for label in row[1:]) for row in self.examples["labels"])
        flops = training_flops(self.model, self.tokens_per_example, labels)
        return None if flops is None else batch_size * flops


class _Stopwatch(TrainerCallback):
    """Ends training when enough steps have been timed.

    A step is timed from the end of the one before it, so that everything the loop does counts. A GPU works asynchronously,
    but every step waits for its own loss, and so for all work of the step before. The time between two ends is therefore
    that of one step's work.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ends: list[float] = []

    @property
    def step_seconds(self) -> list[float]:
        ends = self._ends[_WARM_UP - 1 :]
        return [after - before for before, after in zip(ends, ends[1:], strict=False)]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the time, and stop training when enough steps were timed."""
        self._ends.append(time.perf_counter())
        durations = self.step_seconds
        enough = _LONG_STEPS if sum(durations) >= _STEPS * self._seconds else _STEPS
        if len(durations) >= enough and sum(durations) >= self._seconds:
            control.should_training_stop = True
