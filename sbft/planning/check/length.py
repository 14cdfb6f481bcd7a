"""How long a run is in steps, rows and tokens, and in time by what a former run took."""

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

_AT_ONCE = 1_000


@dataclass(frozen=True)
class RunLength:
    """What a run goes through."""

    steps: int
    rows: int
    """Examples, or the rows that they are packed into, each counted as often as it is seen."""
    epochs: float
    tokens: int
    exact: bool
    """Whether the tokens are exact: else the run ends within an epoch, whose order decides, and they are by the mean."""


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
    """What the rows of the data are like."""

    longest: int
    """Tokens of the longest."""
    padded: bool
    """Whether a batch as wide as the longest takes may hold padding."""
    labelled: int
    """The most labels that one has."""
    lengths: int
    """Different lengths, padding included, where each row is a batch of its own."""
    label_counts: int
    """Different numbers of labels."""


def row_sizes(prepared: Prepared) -> RowSizes:
    """How long the rows are, how many labels they have, and how much both vary."""
    if isinstance(prepared.examples, TokenWindows):
        length = prepared.examples.length
        return RowSizes(length, False, length - 1, 1, 1)
    found, widths, counts = set[int](), set[int](), set[int]()
    multiple = 1 if prepared.recipe.data.packing else Collator.pad_to_multiple_of
    for table in prepared.examples.with_format("arrow").iter(batch_size=_AT_ONCE):
        lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy()
        trained = table["labels"].combine_chunks().flatten().to_numpy() != IGNORED_LABEL
        found.update(np.unique(lengths).tolist())
        widths.update(np.unique(-(-lengths // multiple)).tolist())
        counts.update(np.unique(np.add.reduceat(trained, np.cumsum(lengths) - lengths, dtype=np.int64)).tolist())
    widest = max(widths) * multiple
    # Alone in its batch, a row is padded no further than to the multiple.
    beside = found if prepared.recipe.largest_batch > 1 else {n for n in found if n > widest - multiple}
    return RowSizes(max(found), min(beside) < widest, max(counts), len(widths), len(counts))


@dataclass(frozen=True)
class Duration:
    """How long training will take, and how that is known."""

    train_s: float
    tokens_per_s: float
    source: str
    """The folder of the run that was as fast."""
    same_data: bool
    """Whether that run was of the same data."""


def duration(prepared: Prepared, length: RunLength) -> Duration | None:
    """How long training will take by a former run in the output folder or beside it; None where there is none.

    It must have had the same model, method, dtype, device and batch. Of several, one of the same data is taken before
    others, and a later one before an earlier.
    """
    recipe = prepared.recipe
    folder = Path(str(recipe.output_dir))
    found = [(where, record) for where, record in _records(folder) if _is_alike(record, prepared)]
    if not found:
        return None
    where, record = max(found, key=lambda one: (one[1].dataset == recipe.data.train, one[1].started_at or ""))
    assert record.tokens_per_s is not None
    seconds = length.tokens / record.tokens_per_s
    return Duration(seconds, record.tokens_per_s, str(where), record.dataset == recipe.data.train)


def _records(folder: Path) -> Iterator[tuple[Path, RunRecord]]:
    beside = sorted(folder.parent.iterdir()) if folder.parent.is_dir() else []
    for place in dict.fromkeys([folder, *beside]):
        if not (place / FILE_NAME).is_file():
            continue
        try:
            yield place, RunRecord.load(place)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # another program's file of the same name


def _is_alike(record: RunRecord, prepared: Prepared) -> bool:
    recipe, arguments = prepared.recipe, prepared.arguments
    wanted = (
        recipe.model,
        recipe.method,
        recipe.dtype,
        device_name(),
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
        max(arguments.world_size, 1),
    )
    had = (
        record.model,
        record.method,
        record.dtype,
        record.device,
        record.per_device_batch_size,
        record.gradient_accumulation_steps,
        record.world_size,
    )
    return record.status == "ok" and bool(record.tokens_per_s) and had == wanted
