"""Local files as rows: JSON lines, JSON, CSV, Parquet and plain text, each mistake with its file and line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from sbft.errors import DataError


def read_file(path: Path) -> Dataset:
    """Reads one local file into memory.

    `.jsonl` has one object a line; `.json` one list of objects; `.csv` a header line, all values text; `.parquet` any
    columns; `.txt` gives a column `text` with one row for each document, documents being set apart by blank lines.

    Raises:
        DataError: no such file, an unknown ending, an empty file, or contents that are not what the ending says.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}.{_neighbours(path)}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"The file {path} ends in {path.suffix or 'nothing'}; expected one of {', '.join(READERS)}.")
    try:
        table = reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"The file {path} is not UTF-8 text (byte {error.start}). Convert it to UTF-8.") from error
    if table.num_rows == 0:
        raise DataError(f"The file {path} is empty: it holds no row. Give a file with at least one example.")
    return Dataset(table)


def looks_like_file(source: str) -> bool:
    """Says whether a source that does not exist was meant as a local path, not as a hub id."""
    return source.startswith((".", "/", "~")) or Path(source).suffix.lower() in READERS or source.count("/") > 1


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either."
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in READERS)
    return f" The folder {path.parent.resolve()} has {', '.join(names[:6])}." if names else ""


def _read_json_lines(path: Path) -> pa.Table:
    objects = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"Line {number} of {path} is not valid JSON: {error.msg} at column {error.colno}. Expected one "
                    f"object a line; the line begins {line.strip()[:60]!r}."
                ) from error
            if not isinstance(value, dict):
                raise DataError(
                    f"Line {number} of {path} holds a {type(value).__name__}; expected one JSON object a line, "
                    'like {"prompt": "...", "completion": "..."}.'
                )
            objects.append(value)
    return _table(path, objects)


def _read_json(path: Path) -> pa.Table:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return pa.table({})
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " A file with one object a line is named .jsonl." if error.msg == "Extra data" else ""
        raise DataError(
            f"Line {error.lineno} of {path} is not valid JSON: {error.msg} at column {error.colno}.{hint}"
        ) from error
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise DataError(f"The file {path} holds no list of objects; expected [{{...}}, {{...}}], or name it .jsonl.")
    return _table(path, value)


def _read_csv(path: Path) -> pa.Table:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        rows = []
        try:
            header = reader.fieldnames or []
            begins = reader.line_num + 1
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"Line {begins} of {path} begins a row that has not as many values as the header has "
                        f"columns ({len(header)}). Put values that hold commas in quotation marks, and "
                        "see that each quotation mark is closed."
                    )
                rows.append(row)
                begins = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"Line {begins} of {path} begins a row that is not valid CSV: {error}. See that each quotation mark "
                'in it is closed, and those inside a value are doubled ("").'
            ) from error
    return _table(path, rows)


def _read_parquet(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"The file {path} is not a readable Parquet file: {error}.") from error


def _read_text(path: Path) -> pa.Table:
    text = path.read_text(encoding="utf-8-sig")
    documents = [document.strip("\n") for document in re.split(r"\n\s*\n", text.replace("\r\n", "\n"))]
    return pa.table({"text": pa.array([one for one in documents if one.strip()], type=pa.string())})


def _table(path: Path, objects: Iterable[dict[str, Any]]) -> pa.Table:
    objects = list(objects)
    names = dict.fromkeys(name for one in objects for name in one)
    return pa.table({name: _column(path, name, [one.get(name) for one in objects]) for name in names})


def _column(path: Path, name: str, values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) > 1 and kinds <= {str, int, float, bool}:
        # "42" in one row and 42 in the next: both are text to a language model.
        values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"The values of {name!r} in {path} are not all of one kind ({error}). "
            "Give every row the same kind of value."
        ) from error


READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
