"""Turns labels into words: numbers become text, and values get the names that the model learns to write."""

from __future__ import annotations

import json
import math
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset

from sbft.data.tables import pieces
from sbft.errors import DataError


def label_words(dataset: Dataset, column: str, names: dict[str, str] | None, source: str) -> Dataset:
    """Turns the values of the answer column into the text that the model learns to write.

    With `names`, each value becomes its name. A value is looked up by its text: 0 as "0", true as "true", and 1.0 as "1",
    since a table with missing values stores whole numbers that way. A class of a `datasets.ClassLabel` column is looked up
    by its number or by its own name.

    Without `names`, classes become their own names, whole numbers their digits, and booleans `true` and `false`. Other
    numbers become the shortest text that reads as the same number. Text is left unchanged.

    Missing values become None. They are None, NaN, and the class -1, which data sets on the hub use to hide the labels of
    a test split.

    Args:
        dataset: rows.
        column: the answer column. Without `names`, a data set that lacks it is returned unchanged.
        names: the name of each value.
        source: what the data was loaded from, for messages.

    Raises:
        DataError: `names` is given, but the column is missing or does not hold single values, or a value has no name.
    """
    if column not in dataset.column_names:
        if names:
            raise DataError(
                f"data.label_names names values of the column {column!r}, which {source} does not have; it has "
                f"{', '.join(map(repr, dataset.column_names))}. Set data.completion to the column with the labels."
            )
        return dataset
    feature = dataset.features[column]
    kind = getattr(feature, "dtype", None)
    if names is None and (kind in ("string", "large_string") or not _single(kind)):
        return dataset
    if not _single(kind):
        raise DataError(
            f"data.label_names names values of the column {column!r} of {source}, which is of the type {feature}; "
            "expected text, numbers, or true and false."
        )
    classes = feature.names if isinstance(feature, ClassLabel) else None
    named = None if names is None else {_key(value): word for value, word in names.items()}
    distinct = list(dict.fromkeys(dataset.unique(column)))
    present = [value for value in distinct if not _missing(value, classes)]
    # Tables store whole numbers as floats if some are missing.
    whole = len(present) < len(distinct) and all(isinstance(value, float) and value.is_integer() for value in present)
    where = f"{column!r} of {source}"
    words = {value: _word(int(value) if whole else value, classes, named, where) for value in present}
    named_pieces = [
        pa.array([words.get(value) for value in piece[column]], type=pa.string()) for piece in pieces(dataset, [column])
    ]
    values = pa.chunked_array(named_pieces, type=pa.string())
    order = dataset.column_names
    return dataset.remove_columns(column).add_column(column, values).select_columns(order)


def _single(kind: str | None) -> bool:
    return kind is not None and kind.startswith(("string", "large_string", "int", "uint", "float", "bool", "null"))


def _missing(value: Any, classes: list[str] | None) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value)) or (classes is not None and value == -1)


def _word(value: Any, classes: list[str] | None, named: dict[str, str] | None, where: str) -> str:
    own = classes[value] if classes is not None else None
    if named is None:
        return own if own is not None else _text(value)
    keys = [_key(_text(value)), *([_key(own)] if own is not None else [])]
    matches = [named[key] for key in keys if key in named]
    if not matches:
        shown = f"{_text(value)} ({own})" if own is not None else _text(value)
        raise DataError(
            f"The column {where} holds {shown}, which data.label_names does not name; it names {', '.join(named)}. Add "
            f'{keys[0]!r} with its word, as in data.label_names: {{"{keys[0]}": word}}.'
        )
    return matches[0]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _key(text: str) -> str:
    """The key to look a value up by: true and false in lower case, whole numbers without a decimal point."""
    if text in ("True", "False"):
        return text.lower()
    whole = text.removesuffix(".0")
    return whole if whole.removeprefix("-").isdecimal() else text
