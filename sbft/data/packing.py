"""Packing: several examples in one row, with positions that restart at each, so that none attends to another."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import pyarrow as pa

from sbft.data.tables import GrowingTable

_TOKENS_AT_ONCE = 1 << 20


def pack(table: pa.Table, max_length: int) -> pa.Table:
    """Puts examples into rows of at most `max_length` tokens, longest first, each into the fullest row that has room.

    Args:
        table: `input_ids` and `labels`, lists of int32. No example is longer than `max_length`, and the first token of
            each has no label, as it would be predicted from the example before it.
        max_length: largest number of tokens of a row.

    Returns:
        `input_ids`, `labels` and `position_ids`. If there is no attention mask, transformers derives from the positions
        that attention stays within each example.
    """
    ids, labels = _Lists(table["input_ids"]), _Lists(table["labels"])
    order, rows = _best_fit(ids.lengths, max_length)
    # The position in `order` of each row's first example, and the end of the last row.
    begins = np.searchsorted(rows, np.arange(rows[-1] + 2))
    step = max(_TOKENS_AT_ONCE // max_length, 1)
    packed = GrowingTable()
    for row in range(0, len(begins) - 1, step):
        bounds = begins[row : row + step + 1]
        examples = order[bounds[0] : bounds[-1]]
        lengths = ids.lengths[examples]
        ends = np.concatenate([[0], np.cumsum(lengths)])[bounds - bounds[0]]
        offsets = pa.array(ends, type=pa.int32())
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        columns = {
            "input_ids": ids.joined(examples),
            "labels": labels.joined(examples),
            "position_ids": positions,
        }
        packed.add(
            pa.table({name: pa.ListArray.from_arrays(offsets, pa.array(flat)) for name, flat in columns.items()})
        )
    whole = packed.finish()
    assert whole is not None
    return whole


class _Lists:
    """A column of lists that is not copied: taking rows out of it in any order copies only those."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._values = [chunk.values.to_numpy() for chunk in chunks]
        self._starts = np.cumsum([0, *map(len, chunks)])
        self.lengths: np.ndarray = np.concatenate([np.diff(offsets) for offsets in self._offsets])

    def joined(self, examples: np.ndarray) -> np.ndarray:
        """The values of these lists, concatenated."""
        chunks = np.searchsorted(self._starts, examples, side="right") - 1
        parts = []
        for chunk, place in zip(chunks.tolist(), (examples - self._starts[chunks]).tolist(), strict=True):
            offsets = self._offsets[chunk]
            parts.append(self._values[chunk][offsets[place] : offsets[place + 1]])
        return np.concatenate(parts)


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """The examples in the order of the rows that they are put into; and the row number of each."""
    longest_first = np.argsort(-lengths, kind="stable")
    rows = np.empty(len(lengths), dtype=np.int64)
    room: list[tuple[int, int]] = []  # (tokens free, row), sorted
    count = 0
    for index, length in enumerate(lengths[longest_first].tolist()):
        place = bisect_left(room, (length, -1))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = capacity, count
            count += 1
        rows[index] = row
        if free > length:
            insort(room, (free - length, row))
    by_row = np.argsort(rows, kind="stable")
    return longest_first[by_row], rows[by_row]
