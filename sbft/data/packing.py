"""Packing: several examples in one row, with positions that start again at each, so that none sees another."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import pyarrow as pa


def pack(table: pa.Table, max_length: int) -> pa.Table:
    """Puts examples into rows of at most `max_length` tokens, longest first, each into the fullest row that has room.

    Args:
        table: `input_ids` and `labels`, lists of int32, no example longer than `max_length`; no example's first
            token has a label, as it would be predicted from the example before it.
        max_length: tokens of a row.

    Returns:
        `input_ids`, `labels` and `position_ids`; transformers makes of the positions, where no attention mask is
        given, attention that stays within each example.
    """
    lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy()
    rows = _best_fit(lengths, max_length)
    order = np.concatenate([np.asarray(row) for row in rows])
    ends = np.cumsum([sum(int(lengths[index]) for index in row) for row in rows])
    offsets = pa.array(np.concatenate([[0], ends]), type=pa.int32())
    positions = np.concatenate([np.arange(lengths[index], dtype=np.int32) for index in order])
    columns = {
        name: pa.ListArray.from_arrays(offsets, table[name].combine_chunks().take(pa.array(order)).flatten())
        for name in ("input_ids", "labels")
    }
    return pa.table({**columns, "position_ids": pa.ListArray.from_arrays(offsets, pa.array(positions))})


def _best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, row), sorted
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        place = bisect_left(room, (length, -1))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(int(index))
        if free > length:
            insort(room, (free - length, row))
    return rows
