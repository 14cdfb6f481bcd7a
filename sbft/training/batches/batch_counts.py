"""What the host knows without asking the device, since an answer comes only after all that was launched before.

At batch size 1 a small model gives a GPU so little work that the loop around a step takes as long as the step. The two overlap
where nothing between one backward and the next forward waits for the device.
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
    """Of a batch.

    Attributes:
        tokens: padding aside.
        labelled: whether every position has a label.
        padded_right: whether padding lies behind all tokens of its row, and has no labels.
        targets: labels, those of first tokens aside; None of a batch whose labels are not classes.
        first: labels of the first tokens of rows, which only a model predicts that does not write from left to right.
    """

    tokens: int
    labelled: bool
    padded_right: bool
    targets: int | None = field(default=None, compare=False)
    first: int = field(default=0, compare=False)

    @classmethod
    def of(cls, batch: dict[str, Any]) -> Counts:
        """Counted now: of a batch that lies on a device, after a wait for it."""
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
    """A batch that was counted while it lay on the host. Pinned, sent to a device or pickled it keeps its counts; a copy that
    is made otherwise, and a batch that is changed, have none."""

    _counts: Counts | None = None
    _shapes: dict[str, Any] | None = None
    # Once on a device: its values, and how often they had been written to.
    _sent: dict[str, tuple[Any, int]] | None = None

    @classmethod
    def of(cls, batch: dict[str, Any]) -> CountedBatch:
        """The same tensors, counted."""
        counted = cls(batch)
        counted._counts, counted._shapes = Counts.of(batch), _shapes(batch)
        return counted

    @property
    def counts(self) -> Counts | None:
        """None where there are none, or where they may no longer be true."""
        if self._shapes != _shapes(self):
            return None
        if self._sent is not None and any(
            one is not self._sent[name][0] or _version(one) != self._sent[name][1] for name, one in self.items()
        ):
            return None
        return self._counts

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> CountedBatch:
        """The batch with its tensors on a device; accelerate's data loaders ask for it so."""
        moved = CountedBatch(
            {name: send_to_device(one, device, non_blocking=non_blocking) for name, one in self.items()}
        )
        moved._counts, moved._shapes = self.counts, self._shapes
        moved._sent = {name: (one, _version(one)) for name, one in moved.items()}
        return moved


def _shapes(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: one.shape if isinstance(one, Tensor) else None for name, one in batch.items()}


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


class CountingCollator:
    """A collator whose batches are counted, but for those that are no plain dictionary with a tensor `input_ids`.

    Args:
        collate: as `DataLoader` takes it.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, examples: Any) -> Any:
        batch = self._collate(examples)
        countable = type(batch) is dict and isinstance(batch.get("input_ids"), Tensor)
        return CountedBatch.of(batch) if countable else batch


def counts_of(batch: dict[str, Any], of: dict[str, Any] | None = None) -> Counts:
    """Counts of a batch; where it has none of its own, those of the batch that it was made of without a change."""
    for one in (batch, of):
        known = one.counts if isinstance(one, CountedBatch) else None
        if known is not None and _are_same(batch, one):
            return known
    return Counts.of(batch)


def count_in(batch: Any) -> Count:
    """Tokens, padding aside, or examples of a batch without them; of a batch without counts no more is counted."""
    known = batch.counts if isinstance(batch, CountedBatch) else None
    return count_of(batch) if known is None else Count(known.tokens, True)


def targets_of(batch: Any, *, of_next: bool = True) -> int | None:
    """Labels that are predicted, `of_next` tokens or of the tokens themselves; None where there are none, or no classes."""
    known = batch.counts if isinstance(batch, CountedBatch) else None
    if known is not None:
        targets, first = known.targets, known.first
    else:
        targets, first = _count_targets(batch) if isinstance(batch, Mapping) else (None, 0)
    return targets if targets is None or of_next else targets + first


def labels_of(batches: Sequence[Any], *, of_next: bool = True) -> int | None:
    """Those of several batches."""
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
