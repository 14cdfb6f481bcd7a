"""Where examples come from: hub ids, local files, generated tasks; and how they are split without leaking questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from sbft.data import generated
from sbft.data.corpus import PYTHON_SOURCES, python_sources
from sbft.data.files import looks_like_file, read_file
from sbft.data.labels import label_words
from sbft.data.overlap import normalized, questions, refuse_choice_on_test, refuse_overlap
from sbft.data.tables import GrowingTable, dataset_of
from sbft.errors import DataError
from sbft.models.hub import hub_reachable, hub_state, offline_if_unreachable
from sbft.recipe.schema import DataConfig, SourceConfig

# A generated task is given up after this many rows without a new question between them.
_PATIENCE = 2_000
_AT_ONCE = 10_000


@dataclass(frozen=True)
class Splits:
    """The rows of a run, still as text."""

    train: Dataset
    validation: Dataset | None
    eval: Dataset | None
    dropped_overlap: int
    """Rows left out of training (or validation) because their question is in validation or evaluation."""


def load_source(
    source: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    size: int | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    completion: str = "completion",
    label_names: dict[str, str] | None = None,
) -> Dataset:
    """Loads the rows of one source.

    Args:
        source: hub id, local .jsonl / .json / .csv / .parquet / .txt file, folder, or `generated:NAME`.
        split: split of a hub data set or folder; of a generated task: "train", "validation" or "eval".
        subset: subset (configuration) of a hub data set.
        size: number of rows: a random choice, in the original order. Generated tasks require it.
        seed: seed of the choice, and of the generated task.
        options: settings of a generated task.
        completion: column of the answers; `sbft.data.labels.label_words` turns its values into text.
        label_names: the name of each value of that column.

    Raises:
        DataError: the source or its split is missing, malformed or empty, or a label has no name.
        MissingPackageError: the package that makes a generated task is not installed.
    """
    _check_size("size", size)
    if generated.is_generated(source):
        if size is None:
            raise DataError(f"The data {source} is generated without end: set data.train_size to the number of rows.")
        part = split if split in ("train", "validation", "eval") else "train"
        made = _dataset(islice(generated.rows(source, part=part, seed=seed, options=options), size))
        return label_words(made, completion, label_names, source)
    path = Path(source).expanduser()
    if path.is_dir():
        dataset = _load_folder(path, split)
    elif path.is_file() or looks_like_file(source):
        dataset = read_file(path)
    else:
        dataset = _load_hub(source, split, subset)
    if dataset.num_rows == 0:
        raise DataError(f"The data {source} is empty: it holds no row.")
    return label_words(_choose(dataset, size, seed), completion, label_names, source)


def load_splits(
    *,
    train: str,
    validation: str | None = None,
    eval: str | None = None,
    train_split: str = "train",
    validation_split: str = "validation",
    eval_split: str = "test",
    subset: str | None = None,
    train_size: int | None = None,
    validation_size: int | None = None,
    eval_size: int | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    prompt: str = "prompt",
    completion: str = "completion",
    messages: str = "messages",
    text: str = "text",
    label_names: dict[str, str] | None = None,
    allow_overlap: bool = False,
) -> Splits:
    """Loads training, validation and evaluation rows, without any question of the latter two in training.

    A generated task gives all three parts, in the sizes asked for, from distant seeds. A training row whose question is
    also in validation or evaluation is left out, counted and replaced. So is a validation row whose question is in
    evaluation.

    With files and hub data sets, a part that has a size but no source of its own is split off from the training rows, at
    random by `seed`. Copies of its questions that remain in training are left out and counted.

    Args:
        train: source of the training rows; see `load_source`.
        validation: source of the validation rows.
        eval: source of the evaluation rows.
        train_split, validation_split, eval_split: splits of hub data sets.
        subset: subset of hub data sets.
        train_size, validation_size, eval_size: rows of each part.
        seed: seed of generated tasks, of random choices and of splits.
        options: settings of a generated task.
        prompt, messages, text: names of the columns; a row's question is in the first of these that it has.
        completion, label_names: as for `load_source`.
        allow_overlap: allow a question in several parts, if these are generated or have a source of their own.

    Raises:
        DataError: as `load_source`; or two parts that have a source of their own share questions.
        MissingPackageError: as `load_source`.
    """
    return read_splits(
        DataConfig.model_construct(
            train=train,
            validation=validation,
            eval=eval,
            train_split=train_split,
            validation_split=validation_split,
            eval_split=eval_split,
            subset=subset,
            train_size=train_size,
            validation_size=validation_size,
            eval_size=eval_size,
            seed=seed,
            options=options or {},
            prompt=prompt,
            completion=completion,
            messages=messages,
            text=text,
            label_names=label_names,
            allow_overlap=allow_overlap,
        )
    )


def read_splits(data: DataConfig) -> Splits:
    """As `load_splits`, for the `data` section of a recipe."""
    for part in ("train", "validation", "eval"):
        _check_size(f"{part}_size", getattr(data, f"{part}_size"))
    train, validation = data.train, data.validation
    columns = (data.prompt, data.messages, data.text)
    if generated.is_generated(train) and {validation, data.eval} <= {None, train}:
        return _generated_splits(data)
    held_out = {
        "validation": (validation, data.validation_split, data.validation_size),
        "eval": (data.eval, data.eval_split, data.eval_size),
    }
    shared: dict[str, Any] = {
        name: getattr(data, name) for name in ("subset", "seed", "options", "completion", "label_names")
    }
    places = [_place(source, part, split) for part, (source, split, _) in held_out.items()]
    if validation is not None and not data.allow_overlap and places[0] == places[1]:
        raise DataError(
            f"The validation and the evaluation data are both {validation}. A learning rate would be chosen on the data "
            "that it is then tested on: give one of them a source or split of its own, or set data.allow_overlap: true."
        )
    rows_of_part: dict[str, Dataset | None] = {
        part: None if source is None else load_source(source, split=_part(source, part, split), size=size, **shared)
        for part, (source, split, size) in held_out.items()
    }
    # Parts are split off from all rows; only then are the training rows chosen from the rest.
    whole_size = data.train_size if generated.is_generated(train) else None
    rest = load_source(train, split=_part(train, "train", data.train_split), size=whole_size, **shared)
    if not data.allow_overlap:
        for part, rows in rows_of_part.items():
            if rows is not None:
                refuse_overlap(rest, rows, columns, part, str(held_out[part][0]))
        if rows_of_part["validation"] is not None and rows_of_part["eval"] is not None:
            refuse_choice_on_test(
                rows_of_part["validation"], rows_of_part["eval"], columns, (str(validation), str(data.eval))
            )
    dropped = 0
    for part in ("eval", "validation"):
        source, _, size = held_out[part]
        if source is None and size:
            rows_of_part[part], rest, copies = _split_off(rest, size, data.seed, columns, part)
            dropped += copies
    return Splits(_choose(rest, data.train_size, data.seed), rows_of_part["validation"], rows_of_part["eval"], dropped)


def read_other(source: SourceConfig, data: DataConfig, part: Literal["train", "eval"], key: str) -> Dataset:
    """Loads the rows of other data than the training data.

    Args:
        source: where they are.
        data: the `data` section of the recipe, whose seed and columns count where the source has none of its own.
        part: which part of a generated task, or split of a hub data set that `source` does not name, they are.
        key: the source's key in a recipe, for messages.

    Raises:
        DataError: as `load_source`; or a generated task has no size.
        MissingPackageError: as `load_source`.
    """
    if source.data == PYTHON_SOURCES:
        texts = python_sources().texts(held_out=part == "eval")
        rows = _dataset({source.text or data.text: text} for text in texts)
        return _choose(rows, source.size, data.seed)
    if generated.is_generated(source.data) and source.size is None:
        raise DataError(f"The data {source.data} is generated without end: set {key}.size to the number of rows.")
    split = source.split or ("train" if part == "train" else "test")
    return load_source(
        source.data,
        split=_part(source.data, part, split),
        subset=source.subset,
        size=source.size,
        seed=data.seed,
        options=source.options,
        completion=source.completion or data.completion,
    )


def without_questions_of(rows: Dataset, columns: Sequence[str], held_out: Iterable[str]) -> Dataset:
    """The rows whose question, in the first of the columns that they have, is not one of the held-out ones."""
    asked = set(held_out)
    keep = [question not in asked for question in questions(rows, columns)]
    return rows if all(keep) else rows.select(np.flatnonzero(keep))


def _place(source: str | None, part: str, split: str) -> tuple[str | None, str]:
    """Identifies the rows of a source and its split: if two results are equal, so are the rows."""
    if source is None or generated.is_generated(source):
        return source, part
    path = Path(source).expanduser()
    return (str(path.resolve()), "") if path.is_file() else (source, split)


def _part(source: str, part: str, split: str) -> str:
    return part if generated.is_generated(source) else split


def _generated_splits(data: DataConfig) -> Splits:
    """All parts of one generated task."""
    source = data.train
    for part, wanted in (("validation", data.validation), ("eval", data.eval)):
        if wanted is not None and getattr(data, f"{part}_size") is None:
            raise DataError(
                f"The {part} data {wanted} is generated without end: set data.{part}_size to the number of rows."
            )
    if not data.train_size:
        raise DataError(f"The data {source} is generated without end: set data.train_size to the number of rows.")
    seen: set[str] = set()
    dropped = 0
    parts: dict[str, Dataset | None] = {}
    for part, size in (("eval", data.eval_size), ("validation", data.validation_size), ("train", data.train_size)):
        if not size:
            parts[part] = None
            continue
        rows = generated.rows(source, part=part, seed=data.seed, options=data.options)
        drawn = _Drawn(f"{size} {part} rows of the task {source}", set() if data.allow_overlap else seen)
        kept = _dataset(islice(drawn.without_seen(rows), size))
        dropped += drawn.dropped
        if part != "train":
            seen.update(questions(kept))
        parts[part] = label_words(kept, data.completion, data.label_names, source)
    assert parts["train"] is not None
    return Splits(parts["train"], parts["validation"], parts["eval"], dropped)


class _Drawn:
    """Draws rows of a generated task whose questions are new, and counts those that it drops."""

    def __init__(self, wanted: str, seen: set[str]) -> None:
        self._wanted = wanted
        self._seen = seen
        self.dropped = 0

    def without_seen(self, rows: Iterator[dict[str, str]]) -> Iterator[dict[str, str]]:
        kept = without_news = 0
        for row in rows:
            if normalized(row["prompt"] if "prompt" in row else row["text"]) not in self._seen:
                kept, without_news = kept + 1, 0
                yield row
                continue
            self.dropped += 1
            without_news += 1
            if without_news == _PATIENCE:
                raise DataError(
                    f"There are too few different questions for {self._wanted}: after {kept}, {_PATIENCE:,} in a row "
                    "were already in evaluation or validation. Widen data.options, ask for fewer rows, or set "
                    "data.allow_overlap: true."
                )


def _split_off(
    dataset: Dataset, size: int, seed: int, columns: tuple[str, ...], part: str
) -> tuple[Dataset, Dataset, int]:
    """Takes out `size` random rows; returns them, the rest without their questions, and how many more that dropped."""
    if size >= dataset.num_rows:
        raise DataError(
            f"The training data has {dataset.num_rows} rows, so {size} cannot be split off from it for {part} "
            f"with any left to train on. Lower data.{part}_size, or give data.{part} a source of its own."
        )
    order = np.random.default_rng(seed).permutation(dataset.num_rows)
    taken = dataset.select(np.sort(order[:size]))
    rest = dataset.select(np.sort(order[size:]))
    asked = set(questions(taken, columns))
    keep = np.flatnonzero([question not in asked for question in questions(rest, columns)])
    if not len(keep):
        raise DataError(
            f"No training row is left after {size} rows were split off for {part}: all others ask the same questions. "
            f"Give data.{part} a source of its own."
        )
    return taken, rest.select(keep), rest.num_rows - len(keep)


def _check_size(name: str, size: int | None) -> None:
    if size is not None and size < 1:
        raise DataError(f"data.{name} is {size}; expected at least 1 row, or leave it out for all rows.")


def _choose(dataset: Dataset, size: int | None, seed: int) -> Dataset:
    if size is None or size >= dataset.num_rows:
        return dataset
    indices = np.random.default_rng(seed).choice(dataset.num_rows, size, replace=False)
    return dataset.select(np.sort(indices))


def _dataset(rows: Iterator[dict[str, str]]) -> Dataset:
    """Some rows, of which there must be one."""
    grown = GrowingTable()
    while chunk := list(islice(rows, _AT_ONCE)):
        grown.add(pa.Table.from_pylist(chunk))
    table = grown.finish()
    assert table is not None  # a task has no end
    return dataset_of(table)


def _load_folder(path: Path, split: str | None) -> Dataset:
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        loaded = load_from_disk(str(path)) if saved else load_dataset(str(path))
    except Exception as error:  # the many readers of datasets raise errors of any kind
        raise DataError(f"The folder {path} holds no data set that can be read: {_one_line(error)}") from error
    return _pick(loaded, split, str(path))


def _load_hub(source: str, split: str | None, subset: str | None) -> Dataset:
    try:
        with offline_if_unreachable():
            loaded = load_dataset(source, subset)
    except (OSError, ValueError, RuntimeError) as error:
        if not hub_reachable():
            raise DataError(
                f"The data {source} is neither a file, nor a folder, nor in this machine's cache, and {hub_state()}. "
                "Check the name, or give a local file (.jsonl, .csv, .parquet, .txt) or generated:NAME."
            ) from error
        raise DataError(
            f"The data set {source} could not be loaded from the hub: {_one_line(error)} Check its id and data.subset."
        ) from error
    return _pick(loaded, split, source)


def _pick(loaded: Dataset | DatasetDict, split: str | None, source: str) -> Dataset:
    if isinstance(loaded, Dataset):
        return loaded
    name = split or "train"
    if name not in loaded:
        raise DataError(
            f"The data {source} has no split {name!r}; it has {', '.join(loaded)}. "
            "Set data.train_split, data.validation_split or data.eval_split."
        )
    return loaded[name]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
