"""Data beside that of the run's own task: what is replayed so that the model forgets less, and what is watched for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sbft.data.collate import IGNORED_LABEL
from sbft.data.format import FormatReport, format_table, packed_rows
from sbft.data.overlap import questions, refuse_overlap
from sbft.data.rendering import Rendering
from sbft.data.sources import Splits, read_other, without_questions_of
from sbft.data.tables import GrowingTable, dataset_of
from sbft.data.windows import TokenSplits
from sbft.errors import DataError
from sbft.recipe import Recipe
from sbft.recipe.schema import DataConfig, ReplayConfig

_AT_ONCE = 1_000


@dataclass(frozen=True)
class OtherRows:
    """Rows of another kind than the training data, still as text."""

    rows: Dataset
    rendering: Rendering


@dataclass(frozen=True)
class OtherData:
    """All other data of a recipe."""

    replay: OtherRows | None
    watched: dict[str, OtherRows]
    """By their names in `evaluation.watch`."""


def read_other_data(recipe: Recipe, splits: Splits | TokenSplits) -> OtherData:
    """Read what a recipe replays and watches.

    What is replayed asks no question of the recipe's evaluation, validation or watched data: such rows are left out.

    Args:
        recipe: as `sbft.recipe.resolve` returns it.
        splits: its own data.

    Raises:
        DataError: if a source cannot be read, or the training data has a question of the watched data.
    """
    data = recipe.data
    watched = {
        name: OtherRows(read_other(source, data, "eval", f"evaluation.watch.{name}"), Rendering.of_other(source, data))
        for name, source in recipe.evaluation.watch.items()
    }
    if isinstance(splits, TokenSplits):
        return OtherData(None, watched)
    own = Rendering.of(data)
    if not data.allow_overlap:
        for name, other in watched.items():
            columns = tuple(dict.fromkeys([*_columns(own), *_columns(other.rendering)]))
            refuse_overlap(splits.train, other.rows, columns, "watched", recipe.evaluation.watch[name].data)
    if data.replay is None:
        return OtherData(None, watched)
    replay = OtherRows(read_other(data.replay, data, "train", "data.replay"), Rendering.of_other(data.replay, data))
    if not data.allow_overlap:
        held_out = [OtherRows(rows, own) for rows in (splits.validation, splits.eval) if rows is not None]
        asked = {
            question
            for other in (*held_out, *watched.values())
            for question in questions(other.rows, _columns(other.rendering))
        }
        rows = without_questions_of(replay.rows, _columns(replay.rendering), asked)
        if not len(rows):
            raise DataError(
                f"All rows of data.replay, {data.replay.data}, are also in the evaluation, validation or watched data, so "
                "that none is left to train on. Give one of them a source of its own."
            )
        replay = replace(replay, rows=rows)
    return OtherData(replay, watched)


def mixed(
    table: pa.Table,
    report: FormatReport,
    other: OtherRows,
    replay: ReplayConfig,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Dataset, FormatReport]:
    """Mix data of an old kind into training examples; the same seed gives the same examples at the same places.

    Args:
        table: the training examples, as `sbft.data.format.format_table` makes them.
        report: on the training examples.
        other: what to mix in.
        replay: how much of it.
        data: the recipe's `data` section, with seed, maximal length, and whether to pack.
        tokenizer: the model's tokenizer.

    Returns:
        Training and replayed examples, packed if the recipe says so; and a report on both.
    """
    pool, _ = format_table(other.rows, tokenizer, other.rendering, max_length=data.max_length)
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in pool["input_ids"].chunks])
    generator = np.random.default_rng(data.seed)
    drawn = draw(lengths, replay.share / (1 - replay.share) * report.tokens, generator)
    replayed = _rows(pool, drawn)
    labels = replayed["labels"].combine_chunks().flatten()
    tokens = int(lengths[drawn].sum())
    both = replace(
        report,
        examples=report.examples + len(drawn),
        tokens=report.tokens + tokens,
        completion_tokens=report.completion_tokens + int((labels.to_numpy() != IGNORED_LABEL).sum()),
        longest=max(report.longest, int(lengths[drawn].max())),
        replay_examples=len(drawn),
        replay_tokens=tokens,
    )
    whole = pa.concat_tables([table, replayed])
    if data.packing:
        return packed_rows(whole, both, data.max_length)
    return dataset_of(whole).select(_interleaved(table.num_rows, len(drawn), generator)), both


def draw(lengths: np.ndarray, wanted: float, generator: np.random.Generator) -> np.ndarray:
    """Draw examples until their tokens are as near to a number as whole examples allow; at least one.

    No example is drawn again before all others are.

    Args:
        lengths: tokens of each example.
        wanted: the number of tokens.
        generator: decides the order.

    Returns:
        Indices of the examples, in the order in which they are drawn.
    """
    passes = int(wanted // lengths.sum()) + 1
    order = np.concatenate([generator.permutation(len(lengths)) for _ in range(passes)])
    totals = np.cumsum(lengths[order])
    beyond = int(np.searchsorted(totals, wanted))
    nearest = min(
        (beyond - 1, beyond), key=lambda last: abs(totals[last] - wanted) if 0 <= last < len(totals) else np.inf
    )
    return order[: nearest + 1]


def _rows(table: pa.Table, indices: np.ndarray) -> pa.Table:
    """Copies of these rows."""
    copies = GrowingTable()
    for piece in dataset_of(table).select(indices).with_format("arrow").iter(batch_size=_AT_ONCE):
        copies.add(piece)
    whole = copies.finish()
    assert whole is not None
    return whole


def _interleaved(own: int, other: int, generator: np.random.Generator) -> np.ndarray:
    """Indices into `own` examples with `other` ones behind them: both in their order, at places that chance decides."""
    is_other = np.zeros(own + other, dtype=bool)
    is_other[generator.choice(own + other, other, replace=False)] = True
    return np.where(is_other, own + np.cumsum(is_other) - 1, np.cumsum(~is_other) - 1)


def _columns(rendering: Rendering) -> tuple[str, str, str]:
    return (rendering.prompt, rendering.messages, rendering.text)
