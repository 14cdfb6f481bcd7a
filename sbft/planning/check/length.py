"""How long a run is in steps, rows and tokens, and in seconds as estimated from an earlier run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sbft.data.collate import IGNORED_LABEL, Collator
from sbft.data.windows import TokenWindows
from sbft.native.memory import device_name
from sbft.runs.prepare import Prepared
from sbft.runs.record import FILE_NAME, RunRecord

_CHUNK_ROWS = 1_000


@dataclass(frozen=True)
class RunLength:
    """The length of a run."""

    steps: int
    rows: int
    """Examples, or the rows that they are packed into, each counted as often as it is seen."""
    epochs: float
    tokens: int
    exact: bool
    """Whether `tokens` is exact. A run that ends within an epoch depends on its order; then the mean row is taken."""


def rows_per_step(prepared: Prepared) -> int:
    """Rows of one step, all micro-batches and all ranks together."""
    arguments = prepared.arguments
    readers = prepared.recipe.readers(arguments.world_size)
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * readers


def tokens_per_row(prepared: Prepared) -> float:
    """Mean tokens of an example, or of a row that examples are packed into; padding aside."""
    return prepared.report.tokens / len(prepared.examples)


def tokens_per_step(prepared: Prepared) -> float:
    """Mean tokens of one step, all micro-batches and all ranks together; padding aside."""
    return tokens_per_row(prepared) * min(rows_per_step(prepared), len(prepared.examples))


def run_length(prepared: Prepared) -> RunLength:
    """Steps, rows and tokens of a run, counted as transformers' Trainer counts them."""
    arguments = prepared.arguments
    rows, size = len(prepared.examples), arguments.per_device_train_batch_size
    if arguments.batch_schedule is not None:
        steps = arguments.max_steps
        if steps < 0:
            steps = arguments.batch_schedule.steps(math.ceil(arguments.num_train_epochs * rows))
        seen = arguments.batch_schedule.seen(steps)[-1]
        return RunLength(steps, seen, seen / rows, round(seen * tokens_per_row(prepared)), False)
    if arguments.dataloader_drop_last:
        rows -= rows % size
    batches = math.ceil(math.ceil(rows / size) / prepared.recipe.readers(arguments.world_size))
    per_epoch = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    steps = arguments.max_steps
    if steps < 0:
        steps = math.ceil(arguments.num_train_epochs * per_epoch)
    whole, rest = divmod(steps, per_epoch)
    seen = whole * rows + min(rest * rows_per_step(prepared), rows)
    exact = rest == 0 and rows == len(prepared.examples)
    tokens = whole * prepared.report.tokens if exact else round(seen * tokens_per_row(prepared))
    return RunLength(steps, seen, steps / per_epoch, tokens, exact)


class RowSizes(NamedTuple):
    """Sizes of the rows, as far as memory depends on them."""

    longest: int
    """Tokens of the longest."""
    padded: bool
    """Whether a batch of the widest size may hold padding."""
    labelled: int
    """The most labels in a row."""
    lengths: int
    """Number of different lengths, padding included, where each row is a batch of its own."""
    label_counts: int
    """Number of different label counts."""


def row_sizes(prepared: Prepared) -> RowSizes:
    """How long the rows are, how many labels they have, and how much both vary."""
    if isinstance(prepared.examples, TokenWindows):
        length = prepared.examples.length
        return RowSizes(length, False, length - 1, 1, 1)
    row_lengths, widths, label_counts = set[int](), set[int](), set[int]()
    multiple = 1 if prepared.recipe.data.packing else Collator.pad_to_multiple_of
    for table in prepared.examples.with_format("arrow").iter(batch_size=_CHUNK_ROWS):
        lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy()
        trained = table["labels"].combine_chunks().flatten().to_numpy() != IGNORED_LABEL
        row_lengths.update(np.unique(lengths).tolist())
        widths.update(np.unique(-(-lengths // multiple)).tolist())
        labels_per_row = np.add.reduceat(trained, np.cumsum(lengths) - lengths, dtype=np.int64)
        label_counts.update(np.unique(labels_per_row).tolist())
    widest = max(widths) * multiple
    # A row that is alone in its batch is only padded to the multiple.
    alone = prepared.recipe.largest_batch == 1
    in_widest_batch = {length for length in row_lengths if length > widest - multiple} if alone else row_lengths
    padded = min(in_widest_batch) < widest
    return RowSizes(max(row_lengths), padded, max(label_counts), len(widths), len(label_counts))


@dataclass(frozen=True)
class Duration:
    """How long training will take, and how that is known."""

    train_s: float
    tokens_per_s: float
    source: str
    """The folder of the run that this is estimated from."""
    same_data: bool
    """Whether that run trained on the same data."""


def duration(prepared: Prepared, length: RunLength) -> Duration | None:
    """Estimate the training time from an earlier run in the output folder or beside it; None where there is none.

    That run must have had the same model, method, dtype, device and batch. A run on the same data is preferred, then the
    latest.
    """
    recipe = prepared.recipe
    folder = Path(str(recipe.output_dir))
    runs = [(record, run_folder) for run_folder, record in _records(folder) if _is_alike(record, prepared)]
    if not runs:
        return None
    record, run_folder = max(runs, key=lambda run: (run[0].dataset == recipe.data.train, run[0].started_at or ""))
    assert record.tokens_per_s is not None
    seconds = length.tokens / record.tokens_per_s
    return Duration(seconds, record.tokens_per_s, str(run_folder), record.dataset == recipe.data.train)


def _records(folder: Path) -> Iterator[tuple[Path, RunRecord]]:
    siblings = sorted(folder.parent.iterdir()) if folder.parent.is_dir() else []
    for run_folder in dict.fromkeys([folder, *siblings]):
        if not (run_folder / FILE_NAME).is_file():
            continue
        try:
            yield run_folder, RunRecord.load(run_folder)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # another program's file of the same name


def _is_alike(record: RunRecord, prepared: Prepared) -> bool:
    recipe, arguments = prepared.recipe, prepared.arguments
    expected = (
        recipe.model,
        recipe.method,
        recipe.dtype,
        device_name(),
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
        max(arguments.world_size, 1),
    )
    actual = (
        record.model,
        record.method,
        record.dtype,
        record.device,
        record.per_device_batch_size,
        record.gradient_accumulation_steps,
        record.world_size,
    )
    return record.status == "ok" and bool(record.tokens_per_s) and actual == expected
