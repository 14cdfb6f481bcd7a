"""Measures where the processor time of a pretraining step goes: forward, backward, update, and the rest.

    python scripts/step_overhead.py [--model scratch:1m] [--method adam] [--batch-size 1] [--steps 40] [--profile]

It counts processor time of this process, which other processes hardly affect; run it with OMP_NUM_THREADS=1. With released
gradients, updates are part of backward. --profile prints the functions that the rest is spent in.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from sbft.data.windows import collate_windows
from sbft.recipe import load_recipe, resolve
from sbft.runs.build import prepare_model
from sbft.runs.prepare import prepare
from sbft.training.trainer import SmallBatchTrainer

WARM_UP = 5


class Timed(SmallBatchTrainer):
    """A trainer that adds up the processor time of each part of its steps."""

    spent: Counter[str]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to that of `part`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[part] += time.process_time() - begin

        return call

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Creates the optimizer, with its update timed."""
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.step = self.timed("update", optimizer.step)
        return optimizer


class Measured(TrainerCallback):
    """Starts to count after the warm-up."""

    def __init__(self, profile: cProfile.Profile | None) -> None:
        self.trainer: Timed
        self._profile = profile
        self.begin = self.whole = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Discards the first steps."""
        if state.global_step == WARM_UP:
            self.trainer.spent.clear()
            self.begin = time.process_time()
            if self._profile is not None:
                self._profile.enable()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the count."""
        self.whole = time.process_time() - self.begin
        if self._profile is not None:
            self._profile.disable()


def main() -> None:
    """Train briefly, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scratch:1m")
    parser.add_argument("--method", default="adam")
    parser.add_argument("--data", default="builtin:python-stdlib")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    settings = [
        f"data.max_length={arguments.length}",
        f"training.max_steps={WARM_UP + arguments.steps}",
        f"training.per_device_train_batch_size={arguments.batch_size}",
        "dtype=float32",
    ]
    recipe = resolve(load_recipe(None, settings, model=arguments.model, data=arguments.data, method=arguments.method))
    with tempfile.TemporaryDirectory() as folder:
        _measure(resolve(recipe.model_copy(update={"output_dir": folder})), arguments.steps, arguments.profile)


def _measure(recipe: Any, steps: int, profiled: bool) -> None:
    prepared = prepare(recipe)
    profile = cProfile.Profile() if profiled else None
    measured = Measured(profile)
    trainer = Timed(
        model=prepare_model(recipe, prepared.tokenizer),
        args=prepared.arguments,
        train_dataset=prepared.examples,
        data_collator=collate_windows,
        processing_class=prepared.tokenizer,
        callbacks=[measured],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.spent = Counter()
    measured.trainer = trainer
    trainer.compute_loss = trainer.timed("forward", trainer.compute_loss)
    trainer.accelerator.backward = trainer.timed("backward", trainer.accelerator.backward)
    trainer.train()
    parts = {**trainer.spent, "the rest": measured.whole - sum(trainer.spent.values())}
    print(
        f"{recipe.model}, {recipe.method}, {Path(recipe.data.train).name}: {measured.whole / steps * 1e3:.1f} ms per step"
    )
    for part, seconds in parts.items():
        print(f"  {part:<9} {seconds / steps * 1e3:7.2f} ms {seconds / measured.whole:6.1%}")
    if profile is not None:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(60)


if __name__ == "__main__":
    main()
