"""Gradients of an embedding or an output head that never exist as a whole: they are made in slices of the vocabulary.

At batch size 1 the gradient of an input embedding has no more rows than the example has tokens, and that of an output head is
the product of two small matrices. An optimizer that takes such a gradient (`TokenOptimizer.takes_slices`) makes a few rows of
it at a time, as often as it needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OuterProduct:
    """The gradient of an output head: `left @ right`, rounded to the dtype of the two.

    Attributes:
        left: gradient of the logits, (vocabulary, tokens).
        right: hidden states, (tokens, hidden size).
    """

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class TokenRows:
    """Rows of a gradient by their index; entries of the same row are to be added up.

    Attributes:
        index: int64 (entries,), ascending.
        values: (entries, hidden size).
    """

    index: Tensor
    values: Tensor

    @staticmethod
    def of(sparse: Tensor) -> TokenRows:
        """The rows of a sparse gradient, in order of their index; entries of one row stay in their order."""
        index, order = torch.sort(sparse._indices()[0], stable=True)
        return TokenRows(index, sparse._values()[order])

    def summed(self) -> TokenRows:
        """Each row once, its entries added up as the backward of a plain embedding does."""
        index, inverse = torch.unique_consecutive(self.index, return_inverse=True)
        if len(index) == len(self.index):
            return self
        values = torch.ops.aten.embedding_dense_backward(self.values, inverse, len(index), -1, False)
        return TokenRows(index, values)


@dataclass(frozen=True)
class SlicedGradient:
    """A (vocabulary, hidden size) gradient: a product, some rows, or the sum of both.

    Attributes:
        shape: of the whole gradient.
        product: the output head's part; None if there is none.
        rows: the input embedding's part; None if there is none.
    """

    shape: torch.Size
    product: OuterProduct | None
    rows: TokenRows | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its slices."""
        source = self.rows.values if self.product is None and self.rows is not None else self.product.right  # type: ignore[union-attr]
        return source.dtype

    def with_rows(self, sparse: Tensor) -> SlicedGradient:
        """This gradient plus a sparse one."""
        return SlicedGradient(self.shape, self.product, TokenRows.of(sparse))

    def slices(self, height: int) -> Iterator[tuple[int, Tensor]]:
        """The gradient in slices of `height` rows.

        Yields:
            The index of the first row, and a contiguous slice (at most `height`, hidden size). The next slice overwrites it.
        """
        vocabulary, width = self.shape
        memory = (self.product.right if self.product else self.rows.values).new_empty(min(height, vocabulary), width)  # type: ignore[union-attr]
        starts = range(0, vocabulary, height)
        bounds = [0] * (len(starts) + 1)
        if self.rows is not None:
            edges = torch.arange(0, len(starts) + 1, device=memory.device) * height
            bounds = torch.searchsorted(self.rows.index, edges).tolist()
        for i, start in enumerate(starts):
            part = memory[: min(height, vocabulary - start)]
            if self.product is None:
                part.zero_()
            else:
                torch.mm(self.product.left[start : start + height], self.product.right, out=part)
            if self.rows is not None and bounds[i] < bounds[i + 1]:
                entries = slice(bounds[i], bounds[i + 1])
                part.index_add_(0, self.rows.index[entries] - start, self.rows.values[entries])
            yield start, part
