"""Training examples of token files: windows of one length, each read where it lies when its turn comes."""

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
"""Windows that the loss is measured on where a recipe has no `evaluation.limit`."""


class TokenWindows(TorchDataset[dict[str, np.ndarray]]):
    """Windows of `length` tokens, one behind the other; what is left at the end is no window.

    Each window is mapped by itself, and let go once it is copied. A map of the whole file would count as memory of this
    process as far as it was ever read, in which a run's peak is measured.

    Args:
        path: a file of token ids.
        dtype: of the ids.
        length: tokens of a window.
        most: at most so many windows, spread evenly over the file; None: all.
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
            raise IndexError(index)  # which ends a loop over the windows
        place = index * self._whole // self._count
        offset = place * self.length * self._dtype.itemsize
        mapped = np.memmap(self.path, self._dtype, "r", offset=offset, shape=(self.length,))
        return {"input_ids": mapped.astype(np.int64)}

    def rows(self) -> list[dict[str, list[int]]]:
        """All windows as `sbft.evaluation.likelihood.evaluate_loss` takes examples."""
        return self.first(len(self))

    def first(self, count: int) -> list[dict[str, list[int]]]:
        """The first windows, as many of `count` as there are, in the same form."""
        ids = [self[index]["input_ids"].tolist() for index in range(min(count, len(self)))]
        return [{"input_ids": one, "labels": one} for one in ids]


class TokenSplits:
    """The parts of token files as a run reads them.

    Args:
        files: a finished folder of tokens.
        length: tokens of a window.
        limit: windows of the validation data; `VALIDATION_WINDOWS` when None.

    Raises:
        DataError: if there is no whole window in a part.
    """

    eval: TokenWindows | None = None
    """None: token files have validation data, and no other."""
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
