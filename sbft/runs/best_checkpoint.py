"""Evaluation during training, and the choice of the best checkpoint (`eval_strategy`, `load_best_model_at_end`)."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from sbft.data.format import format_rows
from sbft.data.rendering import Rendering
from sbft.data.windows import TokenWindows
from sbft.errors import RecipeError
from sbft.runs.prepare import Prepared


class LogWhereEvaluated(TrainerCallback):
    """Logs the training loss at every step that is evaluated, so that both losses can be compared."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Log whenever the step is evaluated."""
        control.should_log = control.should_log or control.should_evaluate
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Log whenever the epoch is evaluated."""
        return self.on_step_end(args, state, control)


def held_out_part(prepared: Prepared) -> str | None:
    """The data that is measured during training: `validation` if there is any, else `eval`; None if nothing is.

    Raises:
        RecipeError: if `training.eval_strategy` is set without such data or with a metric other than the loss, or if the
            best step may have no checkpoint.
    """
    recipe, arguments, splits = prepared.recipe, prepared.arguments, prepared.splits
    if arguments.eval_strategy == IntervalStrategy.NO:
        return None
    if splits.validation is None and splits.eval is None:
        raise RecipeError(
            f"training.eval_strategy is {recipe.training['eval_strategy']}, but the recipe has no data to evaluate on. Set "
            "data.validation: my-validation.jsonl, or data.validation_size: 100 to split 100 examples off the training data."
        )
    if arguments.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise RecipeError(
            f"training.metric_for_best_model is {arguments.metric_for_best_model}, but during training only "
            "the loss is measured. Write loss, or leave it out."
        )
    by_steps = arguments.save_strategy == SaveStrategy.STEPS
    if arguments.load_best_model_at_end and by_steps and arguments.eval_steps != arguments.save_steps:
        raise RecipeError(
            f"training.eval_steps is {arguments.eval_steps:g} and training.save_steps {arguments.save_steps:g}, so "
            "the best step may have no checkpoint. Use the same number for both, or set training.save_strategy: best."
        )
    return "eval" if splits.validation is None else "validation"


def held_out_examples(prepared: Prepared, part: str | None) -> Dataset | TokenWindows | None:
    """Token ids and labels of a part of the data, at most `evaluation.limit` examples."""
    if part is None:
        return None
    rows = prepared.splits.eval if part == "eval" else prepared.splits.validation
    assert rows is not None
    if isinstance(rows, TokenWindows):
        return rows  # already within the limit
    limit = prepared.recipe.evaluation.limit
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    data = prepared.recipe.data
    examples, _ = format_rows(rows, prepared.tokenizer, Rendering.of(data), max_length=data.max_length)
    return examples
