"""Tables that grow: in memory while they are small, then in a file that is mapped into memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import IO

import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint

from sbft.errors import DataError
from sbft.files import cache_dir

IN_MEMORY_BYTES = 64 << 20
"""Larger tables are kept in a file."""
_BATCH_BYTES = 8 << 20
_ROWS = 1_000
_PIECE_BYTES = 1 << 20


class GrowingTable:
    """Joins tables of the same schema into one, of any size.

    A mapped file is in memory only while it is read, and the system reclaims that memory when it needs it. The file has
    no name: it disappears with the last table that uses it, however the process ends.
    """

    def __init__(self) -> None:
        self._pending: list[pa.Table] = []
        self._pending_bytes = 0
        self._file: IO[bytes] | None = None
        self._writer: pa.RecordBatchStreamWriter | None = None

    def add(self, table: pa.Table) -> None:
        """Appends rows.

        Raises:
            DataError: sbft's cache folder has no room for them, or cannot be written to.
        """
        self._pending.append(table)
        self._pending_bytes += table.nbytes
        if self._pending_bytes > (IN_MEMORY_BYTES if self._file is None else _BATCH_BYTES):
            self._spill()

    def finish(self) -> pa.Table | None:
        """The whole table; None if nothing was added."""
        if self._file is None or self._writer is None:
            return pa.concat_tables(self._pending) if self._pending else None
        self._spill()
        self._writer.close()
        self._file.flush()
        # Reopened by its descriptor, as it has no name.
        with self._file, pa.memory_map(f"/dev/fd/{self._file.fileno()}") as mapped:
            return pa.ipc.open_stream(mapped).read_all()

    def _spill(self) -> None:
        if not self._pending:
            return
        table = pa.concat_tables(self._pending)
        try:
            if self._file is None or self._writer is None:
                folder = cache_dir()
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed in `finish`, or with this object
                self._writer = pa.ipc.new_stream(self._file, table.schema)
            rows = max(table.num_rows * _BATCH_BYTES // max(table.nbytes, 1), 1)
            for start in range(0, table.num_rows, rows):
                self._writer.write_table(table.slice(start, rows).combine_chunks())
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"Data of more than {IN_MEMORY_BYTES >> 20} MiB is kept in a file in {cache_dir()}, which cannot be written: "
                f"{error.strerror or error}. Free some space there, or set SBFT_CACHE to another folder."
            ) from error
        self._pending, self._pending_bytes = [], 0


def dataset_of(table: pa.Table) -> Dataset:
    """A table as a data set, without a fingerprint of its contents, for which it would be copied."""
    return Dataset(table, fingerprint=generate_random_fingerprint())


def pieces(dataset: Dataset, columns: list[str]) -> Iterator[dict[str, list]]:
    """Yields the values of some columns, for a thousand rows at a time, or for fewer if they are long."""
    selected = dataset.select_columns(columns)
    sizes = selected.with_format("arrow")
    for start in range(0, selected.num_rows, _ROWS):
        for first, end in _halves(sizes, start, min(start + _ROWS, selected.num_rows)):
            yield selected[first:end]


def _halves(sizes: Dataset, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields bounds of parts of these rows, halved until each is small enough or a single row."""
    if end - start == 1 or sizes[start:end].nbytes <= _PIECE_BYTES:
        yield start, end
        return
    middle = (start + end) // 2
    yield from _halves(sizes, start, middle)
    yield from _halves(sizes, middle, end)
