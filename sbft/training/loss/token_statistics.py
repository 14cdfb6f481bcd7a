"""Token accuracy and entropy, computed from the logits that the loss makes anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class TokenStatistics:
    """Sums over the rows that count, as tensors of shape () without gradient. The loss fills them in."""

    correct: Tensor | None = None
    """int64: number of rows whose label has the largest logit."""
    entropy: Tensor | None = None
    """float32: sum of the entropies of the rows' predictions, in nats."""
    labelled: Tensor | None = None
    """int64: number of rows."""

    def row(self) -> Tensor:
        """All three, float32 of shape (3,)."""
        assert self.correct is not None and self.entropy is not None and self.labelled is not None
        return torch.stack((self.correct.float(), self.entropy.float(), self.labelled.float()))


class StatisticsOfSlices:
    """Computes the statistics from the logits of the whole vocabulary, or slice by slice and then over the ranks."""

    _elements = 2**20  # most probabilities that exist at once

    def __init__(self, statistics: TokenStatistics, counted: Tensor | None) -> None:
        self._statistics = statistics
        self._counted = counted
        self._largest: Tensor | None = None
        self._is_label = self._mean = self._log_sum = torch.empty(0)

    def of_all(self, logits: Tensor, log_probabilities: Tensor, labels: Tensor) -> None:
        """Fill in the statistics from logits and log probabilities, both (rows, vocabulary), and labels, (rows,)."""
        entropies = [-torch.linalg.vecdot(part.exp(), part) for part in self._parts(log_probabilities)]
        self._fill_in(logits.argmax(1) == labels, torch.cat(entropies))

    def add_slice(self, logits: Tensor, log_sum: Tensor, labels: Tensor) -> None:
        """Take in one slice of the vocabulary.

        Args:
            logits: float32 of shape (rows, size).
            log_sum: (rows,), the logarithm of the sum of their exponentials.
            labels: (rows,), relative to the slice's first token.
        """
        largest, index = logits.max(1)
        pairs = zip(self._parts(logits), self._parts(log_sum.unsqueeze(1), logits.shape[1]), strict=True)
        mean = torch.cat([torch.linalg.vecdot((part - norm).exp(), part) for part, norm in pairs])
        is_label = (index == labels).float()
        if self._largest is None:
            self._largest, self._is_label, self._mean, self._log_sum = largest, is_label, mean, log_sum
            return
        self._is_label = is_label.where(largest > self._largest, self._is_label)  # the first of equal ones, as argmax does
        self._largest = self._largest.maximum(largest)
        total = self._log_sum.logaddexp(log_sum)
        self._mean = self._mean * (self._log_sum - total).exp() + mean * (log_sum - total).exp()
        self._log_sum = total

    def of_this_rank(self) -> tuple[Tensor, ...]:
        """For the other ranks: largest logit, whether it is the label's, expected logit; each float32 of shape (rows,)."""
        assert self._largest is not None
        return self._largest, self._is_label, self._mean

    def join(self, log_sums: Tensor, largest: Tensor, is_label: Tensor, means: Tensor) -> None:
        """Take in what `of_this_rank` returned on all ranks, each (ranks, rows)."""
        self._is_label = is_label.gather(0, largest.argmax(0, keepdim=True)).squeeze(0)
        self._mean = (log_sums.softmax(0) * means).sum(0)

    def finish(self, log_sum: Tensor) -> None:
        """Fill in the statistics when all slices are added; `log_sum`, (rows,), is over the whole vocabulary."""
        self._fill_in(self._is_label != 0, log_sum - self._mean)

    def _fill_in(self, is_right: Tensor, entropies: Tensor) -> None:
        counted = torch.ones_like(is_right) if self._counted is None else self._counted
        self._statistics.correct = (is_right & counted).sum()
        self._statistics.entropy = entropies.where(counted, 0.0).sum()
        self._statistics.labelled = counted.sum()

    def _parts(self, rows: Tensor, width: int | None = None) -> Sequence[Tensor]:
        return rows.split(max(1, self._elements // (rows.shape[1] if width is None else width)))
