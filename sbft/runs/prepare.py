"""Everything that a run needs before it loads its model: its recipe, its tokenizer and its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sbft.data.format import FormatReport, format_rows, format_table
from sbft.data.rendering import Rendering
from sbft.data.sources import Splits, read_splits
from sbft.data.windows import TokenSplits, TokenWindows
from sbft.models.load import load_tokenizer
from sbft.recipe import Recipe
from sbft.recipe.pretraining import is_pretraining
from sbft.recipe.schema import DataConfig
from sbft.runs.build import training_arguments
from sbft.runs.other_data import OtherData, OtherRows, mixed, read_other_data
from sbft.runs.token_data import load_tokens, set_length
from sbft.training.arguments import SmallBatchTrainingArguments


@dataclass(frozen=True)
class Prepared:
    """What a run needs before it loads its model."""

    recipe: Recipe
    arguments: SmallBatchTrainingArguments
    tokenizer: PreTrainedTokenizerBase
    splits: Splits | TokenSplits
    examples: Dataset | TokenWindows
    """Token ids and labels of the training data, as `sbft.data.format.format_dataset` makes them, or windows of tokens."""
    report: FormatReport
    watched: dict[str, OtherRows] = field(default_factory=dict)
    """What else the model is measured on, by the names in the recipe's `evaluation.watch`."""

    @property
    def pretrains(self) -> bool:
        """Whether the examples are windows of tokens, every one of which is learned."""
        return isinstance(self.examples, TokenWindows)


def prepare(
    recipe: Recipe,
    arguments: SmallBatchTrainingArguments | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Prepared:
    """Read the tokenizer and the data of a resolved recipe.

    Args:
        recipe: as `sbft.recipe.resolve` returns it.
        arguments: the training arguments, made from the recipe if None. In pretraining, their `max_steps` is set here.
        say: called with a sentence before anything slow.

    Raises:
        SbftError: if anything is missing, cannot be read, or leaves nothing to train on.
    """
    if arguments is None:
        arguments = training_arguments(recipe, Path(str(recipe.output_dir)))
    if is_pretraining(recipe.model_dump(exclude_none=True)):
        return _prepare_tokens(recipe, arguments, say)
    tokenizer = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
    splits = read_splits(recipe.data)
    other = read_other_data(recipe, splits)  # whether it thinks is decided by its own rows
    _decide_thinking(recipe, splits, tokenizer)
    examples, report = _format(recipe.data, splits.train, other, tokenizer)
    return Prepared(recipe, arguments, tokenizer, splits, examples, report, other.watched)


def _format(
    data: DataConfig, train: Dataset, other: OtherData, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, FormatReport]:
    """The examples to train on, with those that the recipe mixes in."""
    rendering = Rendering.of(data)
    if data.replay is None or other.replay is None:
        return format_rows(train, tokenizer, rendering, max_length=data.max_length, packing=data.packing)
    table, report = format_table(train, tokenizer, rendering, max_length=data.max_length)
    return mixed(table, report, other.replay, data.replay, data, tokenizer)


def _decide_thinking(recipe: Recipe, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write into the recipe whether the model thinks, so that it is prompted later as it was trained."""
    parts = [part for part in (splits.train, splits.validation, splits.eval) if part is not None]
    decided = Rendering.of(recipe.data).thinking(parts, tokenizer).chat_template_kwargs
    recipe.data.chat_template_kwargs = dict(decided or {})


def _prepare_tokens(recipe: Recipe, arguments: SmallBatchTrainingArguments, say: Callable[[str], None]) -> Prepared:
    tokenizer, splits, report = load_tokens(recipe, say)
    set_length(recipe, arguments, tokenizer)
    arguments.remove_unused_columns = False  # windows have no columns to remove
    watched = read_other_data(recipe, splits).watched
    return Prepared(recipe, arguments, tokenizer, splits, splits.train, report, watched)


def evaluation_rows(splits: Splits | TokenSplits) -> Dataset | TokenWindows | None:
    """What the run is measured on: the evaluation data, or the validation data if the recipe has no other."""
    return splits.eval if splits.eval is not None else splits.validation
