"""Which checkpoint is the best: what `eval_strategy`, and with it `load_best_model_at_end`, measure within training."""

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
    """Logs the training loss at every step that is evaluated, so that the two stand side by side."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """What is due after this step is decided."""
        control.should_log = control.should_log or control.should_evaluate
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """What is due after this epoch is decided."""
        return self.on_step_end(args, state, control)


def held_out_part(prepared: Prepared) -> str | None:
    """The part that is measured within training, `validation` if there is one, else `eval`; None if nothing is.

    Raises:
        RecipeError: if `training.eval_strategy` asks for it without such data, or for another metric than the loss, or
            the best step would have no checkpoint.
    """
    recipe, arguments, splits = prepared.recipe, prepared.arguments, prepared.splits
    if arguments.eval_strategy == IntervalStrategy.NO:
        return None
    if splits.validation is None and splits.eval is None:
        raise RecipeError(
            f"training.eval_strategy is {recipe.training['eval_strategy']}, but the recipe has no data to evaluate on. Write "
            "data.validation: my-validation.jsonl, or data.validation_size: 100 to split off so many examples from the "
            "training data."
        )
    if arguments.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise RecipeError(
            f"training.metric_for_best_model is {arguments.metric_for_best_model}, but within training nothing but the "
            "loss is measured. Write loss, or leave it out."
        )
    by_steps = arguments.save_strategy == SaveStrategy.STEPS
    if arguments.load_best_model_at_end and by_steps and arguments.eval_steps != arguments.save_steps:
        raise RecipeError(
            f"training.eval_steps is {arguments.eval_steps:g} and training.save_steps {arguments.save_steps:g}, so that "
            "the best step may be one without a checkpoint. Write the same number for both, or training.save_strategy: "
            "best."
        )
    return "eval" if splits.validation is None else "validation"


def held_out_examples(prepared: Prepared, part: str | None) -> Dataset | TokenWindows | None:
    """Token ids and labels of a part, as many examples as `evaluation.limit` allows."""
    if part is None:
        return None
    rows = prepared.splits.eval if part == "eval" else prepared.splits.validation
    assert rows is not None
    if isinstance(rows, TokenWindows):
        return rows  # no more than the limit
    limit = prepared.recipe.evaluation.limit
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    data = prepared.recipe.data
    examples, _ = format_rows(rows, prepared.tokenizer, Rendering.of(data), max_length=data.max_length)
    return examples
