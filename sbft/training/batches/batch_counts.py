"""Counts the tokens and labels of batches on the host, before they are sent to the device.

Reading a number from a GPU waits for all that was launched before. At batch size 1 a small model gives a GPU so little work
that the loop around a step takes as long as the step. The two overlap if nothing between one backward and the next forward
waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import Tensor

from sbft.data.collate import IGNORED_LABEL
from sbft.optim.counting import Count, count_of


@dataclass(frozen=True)
class Counts:
    """What a batch holds.

    Attributes:
        tokens: without padding.
        labelled: whether every position has a label.
        padded_right: whether padding is behind all tokens of its row and has no labels.
        targets: labels, without those of the first tokens of rows; None if the labels are not classes.
        first: labels of the first tokens of rows. Models that predict the next token do not learn from them.
    """

    tokens: int
    labelled: bool
    padded_right: bool
    targets: int | None = field(default=None, compare=False)
    first: int = field(default=0, compare=False)

    @classmethod
    def of(cls, batch: dict[str, Any]) -> Counts:
        """Count a batch now; for a batch on a device, this waits for the device."""
        tokens, mask, labels = count_of(batch).number, batch.get("attention_mask"), batch.get("labels")
        has_label = labels != IGNORED_LABEL if isinstance(labels, Tensor) else None
        labelled = has_label is not None and bool(has_label.all())
        targets, first = _count_targets(batch)
        if mask is None or mask.dim() != 2:
            return cls(tokens, labelled, mask is None, targets, first)
        is_token = mask != 0
        padded_right = bool((is_token[:, 1:] <= is_token[:, :-1]).all())
        if has_label is not None and has_label.shape == is_token.shape:
            padded_right &= bool((has_label <= is_token).all())
        return cls(tokens, labelled, padded_right, targets, first)


class CountedBatch(dict[str, Any]):
    """A batch that was counted while it was on the host.

    It keeps its counts when it is pinned, sent to a device or pickled. Other copies, and a batch that was changed, have none.
    """

    _counts: Counts | None = None
    _shapes: dict[str, Any] | None = None
    # After it was sent to a device: its values, and the version of each at that time.
    _sent: dict[str, tuple[Any, int]] | None = None

    @classmethod
    def of(cls, batch: dict[str, Any]) -> CountedBatch:
        """The same tensors, counted."""
        counted = cls(batch)
        counted._counts, counted._shapes = Counts.of(batch), _shapes(batch)
        return counted

    @property
    def counts(self) -> Counts | None:
        """The counts; None if there are none or the batch was changed since."""
        if self._shapes != _shapes(self):
            return None
        if self._sent is not None and any(
            value is not self._sent[name][0] or _version(value) != self._sent[name][1] for name, value in self.items()
        ):
            return None
        return self._counts

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> CountedBatch:
        """The batch with its tensors on a device; accelerate's data loaders call this."""
        moved = CountedBatch(
            {name: send_to_device(value, device, non_blocking=non_blocking) for name, value in self.items()}
        )
        moved._counts, moved._shapes = self.counts, self._shapes
        moved._sent = {name: (value, _version(value)) for name, value in moved.items()}
        return moved


def _shapes(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.shape if isinstance(value, Tensor) else None for name, value in batch.items()}


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


class CountingCollator:
    """A collator that counts its batches if they are plain dictionaries with a tensor `input_ids`.

    Args:
        collate: as `DataLoader` takes it.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, examples: Any) -> Any:
        batch = self._collate(examples)
        countable = type(batch) is dict and isinstance(batch.get("input_ids"), Tensor)
        return CountedBatch.of(batch) if countable else batch


def counts_of(batch: dict[str, Any], source: dict[str, Any] | None = None) -> Counts:
    """Counts of a batch: its own, or those of the batch that it was made from if it holds the same values, or new ones."""
    for counted in (batch, source):
        counts = counted.counts if isinstance(counted, CountedBatch) else None
        if counts is not None and _are_same(batch, counted):
            return counts
    return Counts.of(batch)


def count_in(batch: Any) -> Count:
    """Tokens of a batch without padding, or examples if it holds no tokens."""
    counts = batch.counts if isinstance(batch, CountedBatch) else None
    return count_of(batch) if counts is None else Count(counts.tokens, True)


def targets_of(batch: Any, *, of_next: bool = True) -> int | None:
    """The number of labels that the model learns from.

    Args:
        batch: of any kind.
        of_next: the model predicts next tokens, so that labels of the first tokens do not count.

    Returns:
        None if the batch has no labels, or they are not classes.
    """
    counts = batch.counts if isinstance(batch, CountedBatch) else None
    if counts is not None:
        targets, first = counts.targets, counts.first
    else:
        targets, first = _count_targets(batch) if isinstance(batch, Mapping) else (None, 0)
    return targets if targets is None or of_next else targets + first


def labels_of(batches: Sequence[Any], *, of_next: bool = True) -> int | None:
    """The sum of `targets_of` over several batches; None if it is None for any of them."""
    counted = [targets_of(batch, of_next=of_next) for batch in batches]
    return None if None in counted else sum(count for count in counted if count is not None)


def _count_targets(batch: Mapping[str, Any]) -> tuple[int | None, int]:
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None, 0
    has_label = labels != IGNORED_LABEL
    if isinstance(ids, Tensor) and labels.dim() == 2 and labels.shape == ids.shape and "decoder_input_ids" not in batch:
        return int(has_label[:, 1:].sum()), int(has_label[:, :1].sum())
    return int(has_label.sum()), 0


def _are_same(batch: dict[str, Any], other: Any) -> bool:
    return batch.keys() == other.keys() and all(batch[name] is other[name] for name in batch)
