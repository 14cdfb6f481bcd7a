"""Reads local files as rows: JSON lines, JSON, CSV, Parquet and plain text. Errors name the file and the line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from sbft.data.tables import GrowingTable, dataset_of
from sbft.errors import DataError

_SCALARS = {str, int, float, bool}
_LARGEST, _SMALLEST = 2**63 - 1, -(2**63)  # limits of an integer in a table
# Rows are read in chunks of this many, or of fewer once their text has this many characters.
_ROWS, _CHARACTERS = 10_000, 16 << 20
_PARQUET_BYTES = 16 << 20
_CSV_FIELD = 2**31 - 1
_OBJECTS = ("arguments", "parameters")
# Half of a character beyond U+FFFF, as JSON writes it; by itself it is not a character.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Row = dict[str, Any]


def read_file(path: Path) -> Dataset:
    """Reads one local file. Large data is mapped into memory, not loaded (but a `.json` file is loaded while it is read).

    What each kind of file holds:
        `.jsonl`: one object per line.
        `.json`: one list of objects.
        `.csv`: a header line, and values between commas, semicolons or tabs; all values are text.
        `.parquet`: any columns.
        `.txt`: documents separated by blank lines. They become the rows of a column `text`.

    Raises:
        DataError: the file is missing or empty, its ending is unknown, or its contents do not match its ending.
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
    except PermissionError as error:
        raise DataError(f"The file {path} cannot be read: {error.strerror}.") from error
    if table is None or table.num_rows == 0:
        raise DataError(f"The file {path} is empty: it holds no row. Give a file with at least one example.")
    try:
        return dataset_of(table)
    except (pa.ArrowException, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise DataError(
            f"The columns of {path} are of a type that datasets cannot hold: {_one_line(error)}. Write them as text, "
            "numbers and lists."
        ) from error


def looks_like_file(source: str) -> bool:
    """Whether a source that does not exist was meant as a local path, not as a hub id."""
    return source.startswith((".", "/", "~")) or Path(source).suffix.lower() in READERS or source.count("/") > 1


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either."
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in READERS)
    return f" The folder {path.parent.resolve()} has {', '.join(names[:6])}." if names else ""


def _read_json_lines(path: Path) -> pa.Table | None:
    return _table(path, lambda: _in_chunks(_json_lines(path)))


def _json_lines(path: Path) -> Iterator[tuple[Row, int]]:
    """Yields the object on each line, and the length of the line."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            value = _json(line, f"Line {number} of {path}", " Expected one object per line")
            if not isinstance(value, dict):
                raise DataError(
                    f"Line {number} of {path} holds a {type(value).__name__}; expected one JSON object per line, "
                    'like {"prompt": "...", "completion": "..."}.'
                )
            yield _with_objects_as_text(value), len(line)


def _with_objects_as_text(value: Any, depth: int = 0) -> Any:
    """The row with the arguments of tool calls and the parameters of tools as JSON text.

    Their keys differ from row to row; a table would give every row all of the keys, with null values.
    """
    if isinstance(value, dict):
        return {
            key: json.dumps(item, ensure_ascii=False)
            if depth and key in _OBJECTS and isinstance(item, dict)
            else _with_objects_as_text(item, depth + 1)
            for key, item in value.items()
        }
    return [_with_objects_as_text(item, depth + 1) for item in value] if isinstance(value, list) else value


def _json(text: str, where: str, expected: str = "") -> Any:
    """The value of a JSON text, if a table can hold every character of it.

    Raises:
        DataError: the text is not valid JSON, is nested too deeply, or holds a number or character that cannot be read.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        begins = f"{expected}; the line begins {text.strip()[:60]!r}." if expected else ""
        hint = (
            " A file with one object per line must be named .jsonl."
            if error.msg == "Extra data" and not expected
            else ""
        )
        line = f", line {error.lineno}" if not expected else ""
        raise DataError(
            f"{where} is not valid JSON: {error.msg}{line} at column {error.colno}.{begins}{hint}"
        ) from error
    except RecursionError as error:
        raise DataError(
            f"{where} is nested too deeply to be read. Give rows of text, or of lists of messages."
        ) from error
    except ValueError as error:
        raise DataError(f"{where} holds a number with too many digits. Write it as text.") from error
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where} holds {error.object[error.start]!r}, half of a character that JSON writes as two, such as "
                "\\ud83d\\ude00: the text was cut between them. Correct or remove it."
            ) from error
    return value


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        DataError: the file cannot be read, or is not valid JSON.
    """
    try:
        return _json(path.read_text(encoding="utf-8-sig"), f"The file {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The file {path} cannot be read: {error}.") from error


def _read_json(path: Path) -> pa.Table | None:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return None
    value = _json(text, f"The file {path}")
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(
            f"The file {path} does not hold a list of objects; expected [{{...}}, {{...}}], or name it .jsonl."
        )
    return _table(path, lambda: _in_chunks((_with_objects_as_text(item), 0) for item in value))


def _read_csv(path: Path) -> pa.Table | None:
    with _long_fields():
        return _table(path, lambda: _in_chunks(_csv_rows(path)))


@contextmanager
def _long_fields() -> Iterator[None]:
    """Within, CSV values may be of any length; by default, Python's reader allows 131,072 characters."""
    former = csv.field_size_limit(_CSV_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(former)


def _csv_rows(path: Path) -> Iterator[tuple[Row, int]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=_delimiter(lines), strict=True)
        begins = 1
        try:
            header = reader.fieldnames or []
            if twice := [name for name in header if header.count(name) > 1]:
                raise DataError(f"The header of {path} names the column {twice[0]!r} twice. Rename one of them.")
            begins = reader.line_num + 1
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"Line {begins} of {path} begins a row with more or fewer values than the header has "
                        f"columns ({len(header)}). Put values that contain commas in quotation marks, and "
                        "make sure that each quotation mark is closed."
                    )
                yield row, sum(map(len, row.values()))
                begins = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"Line {begins} of {path} begins a row that is not valid CSV: {error}. Make sure that each quotation "
                'mark in it is closed, and that those inside a value are doubled ("").'
            ) from error


def _delimiter(lines: TextIO) -> str:
    """What separates the names in a header: a comma; if there is none, a semicolon or a tab, as Excel writes them."""
    header = lines.readline()
    lines.seek(0)
    outside_quotes = re.sub(r'"[^"]*"', "", header)
    return next((mark for mark in ",;\t" if mark in outside_quotes), ",")


def _read_parquet(path: Path) -> pa.Table | None:
    grown = GrowingTable()
    try:
        # The file is neither mapped nor read ahead: both would count as memory of this process.
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"The file {path} has two columns called {twice[0]!r}. Rename one of them.")
            for batch in file.iter_batches(batch_size=_rows_at_once(file.metadata)):
                grown.add(pa.Table.from_batches([batch], schema=file.schema_arrow))
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise DataError(f"The file {path} is not a readable Parquet file: {_one_line(error)}.") from error
    return grown.finish()


def _rows_at_once(metadata: pq.FileMetaData) -> int:
    size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    return min(max(_PARQUET_BYTES * metadata.num_rows // max(size, 1), 1), _ROWS)


def _read_text(path: Path) -> pa.Table | None:
    return _table(path, lambda: _in_chunks(({"text": document}, len(document)) for document in _documents(path)))


def _documents(path: Path) -> Iterator[str]:
    document: list[str] = []
    with path.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                document.append(line)
            elif document:
                yield "".join(document).strip("\n")
                document = []
    if document:
        yield "".join(document).strip("\n")


def _in_chunks(rows: Iterator[tuple[Row, int]]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    characters = 0
    for row, length in rows:
        chunk.append(row)
        characters += length
        if len(chunk) == _ROWS or characters >= _CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _table(path: Path, chunks: Callable[[], Iterator[list[Row]]]) -> pa.Table | None:
    """All rows as one table. They are read a second time if later rows change the type of a column, or add one."""
    columns = _Columns(path)
    grown: GrowingTable | None = GrowingTable()
    for number, rows in enumerate(chunks()):
        if columns.learn(rows) and number:
            grown = None
        if grown is not None:
            grown.add(columns.table(rows))
    if grown is None:
        grown = GrowingTable()
        for rows in chunks():
            grown.add(columns.table(rows))
    return grown.finish()


class _Columns:
    """The columns of a file and their types, as far as it has been read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kinds: dict[str, set[type]] = {}
        self._types: dict[str, pa.DataType] = {}

    def learn(self, rows: list[Row]) -> bool:
        """Looks at more rows; returns whether a column was added or has another type than before."""
        before = dict(self._types)
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [value for row in rows if (value := row.get(name)) is not None]
            kinds = self._kinds.setdefault(name, set())
            kinds |= set(map(type, values))
            # A number that is too large for a column of numbers makes it text, too.
            if int in kinds and any(type(value) is int and not _SMALLEST <= value <= _LARGEST for value in values):
                kinds.add(str)
            self._types[name] = pa.string() if self._is_text(name) else self._type(name, values)
        return before != self._types

    def table(self, rows: list[Row]) -> pa.Table:
        """A table of rows that were given to `learn`."""
        return pa.table({name: self._array(name, [row.get(name) for row in rows]) for name in self._types})

    def _is_text(self, name: str) -> bool:
        """Whether a column is text, as it is if "42" is in one row and 42 in the next."""
        kinds = self._kinds[name]
        return kinds == {str} or (len(kinds) > 1 and kinds <= _SCALARS)

    def _type(self, name: str, values: list[Any]) -> pa.DataType:
        with self._one_kind(name):
            new = pa.array(values).type
            known = self._types.get(name, new)
            schemas = [pa.schema([("", kind)]) for kind in (known, new)]
            return pa.unify_schemas(schemas, promote_options="permissive").field(0).type

    def _array(self, name: str, values: list[Any]) -> pa.Array:
        if self._is_text(name):
            values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        with self._one_kind(name):
            return pa.array(values, type=self._types[name])

    @contextmanager
    def _one_kind(self, name: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(
                f"The values of {name!r} in {self._path} are not all of one kind ({_one_line(error)}). "
                "Give every row the same kind of value."
            ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300]


READERS: dict[str, Callable[[Path], pa.Table | None]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
