"""Training examples from token files: windows of equal length, each read from the file when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from sbft.data.token_files import TRAIN, VALIDATION, TokenFiles
from sbft.errors import DataError

VALIDATION_WINDOWS = 200
"""Number of windows to measure the loss on, unless a recipe sets `evaluation.limit`."""


class TokenWindows(TorchDataset[dict[str, np.ndarray]]):
    """Consecutive windows of `length` tokens; an incomplete window at the end is left out.

    Each window is mapped separately, and unmapped once it is copied. With a map of the whole file, everything read so far
    would count as memory of this process, and a run's peak is measured by that.

    Args:
        path: a file of token ids.
        dtype: dtype of the ids.
        length: tokens per window.
        most: largest number of windows, spread evenly over the file; None for all.
    """

    def __init__(self, path: Path, dtype: str, length: int, most: int | None = None) -> None:
        self.path, self.length = path, length
        self._dtype = np.dtype(dtype)
        self._whole = path.stat().st_size // (self._dtype.itemsize * length)
        self._count = self._whole if most is None else min(most, self._whole)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`input_ids`, int64 of shape (length,); they are the labels too."""
        if not 0 <= index < self._count:
            raise IndexError(index)  # ends a loop over the windows
        place = index * self._whole // self._count
        offset = place * self.length * self._dtype.itemsize
        mapped = np.memmap(self.path, self._dtype, "r", offset=offset, shape=(self.length,))
        return {"input_ids": mapped.astype(np.int64)}

    def rows(self) -> list[dict[str, list[int]]]:
        """All windows, in the form in which `sbft.evaluation.likelihood.evaluate_loss` takes examples."""
        return self.first(len(self))

    def first(self, count: int) -> list[dict[str, list[int]]]:
        """The first `count` windows, or all if there are fewer, in the same form."""
        ids = [self[index]["input_ids"].tolist() for index in range(min(count, len(self)))]
        return [{"input_ids": window, "labels": window} for window in ids]


class TokenSplits:
    """The parts of token files, as a run reads them.

    Args:
        files: a finished folder of tokens.
        length: tokens per window.
        limit: number of validation windows; `VALIDATION_WINDOWS` when None.

    Raises:
        DataError: if a part has less than one window.
    """

    eval: TokenWindows | None = None
    """Always None: besides training data, token files have only validation data."""
    dropped_overlap = 0

    def __init__(self, files: TokenFiles, length: int, limit: int | None = None) -> None:
        for part in (TRAIN, VALIDATION):
            if files.tokens[part] < length:
                raise DataError(
                    f"The {part} part of {files.source} has {files.tokens[part]:,} tokens, fewer than one window of "
                    f"{length:,}. Lower data.max_length, or give more text."
                )
        most = VALIDATION_WINDOWS if limit is None else limit
        self.train = TokenWindows(files.path(TRAIN), files.dtype, length)
        self.validation = TokenWindows(files.path(VALIDATION), files.dtype, length, most)


def collate_windows(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of windows: `input_ids` and `labels`, int64 of shape (batch, length). There is no padding, hence no mask."""
    ids = torch.from_numpy(np.stack([example["input_ids"] for example in examples]))
    return {"input_ids": ids, "labels": ids}
