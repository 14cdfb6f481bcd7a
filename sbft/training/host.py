"""What the host knows without asking the device, which would be a wait for all that was launched before.

A step at batch size 1 has so little work for a GPU that the loop around it takes as long; the two overlap only where nothing
between one backward and the next forward waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import Tensor

from sbft.data.collate import IGNORED_LABEL


class CountedBatch(dict[str, Any]):
    """A batch, counted while it lay on the host. What is made of it, such as its copy on a device, keeps the counts.

    Attributes:
        tokens: padding aside; None if they were not counted.
        labelled: whether every position has a label; None if nobody looked.
    """

    tokens: int | None = None
    labelled: bool | None = None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> CountedBatch:
        """The batch with its tensors on a device; accelerate's data loaders ask for it so."""
        moved = CountedBatch(
            {name: send_to_device(one, device, non_blocking=non_blocking) for name, one in self.items()}
        )
        moved.tokens, moved.labelled = self.tokens, self.labelled
        return moved


class CountingCollator:
    """A collator whose batches are counted; batches that are no plain dictionaries are left as they are.

    Args:
        collate: as `DataLoader` takes it.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, examples: Any) -> Any:
        batch = self._collate(examples)
        if type(batch) is not dict or not isinstance(batch.get("input_ids"), Tensor):
            return batch
        counted = CountedBatch(batch)
        counted.tokens, counted.labelled = count_tokens(batch), is_labelled(batch)
        return counted


def count_tokens(batch: dict[str, Any]) -> int:
    """Tokens of a batch, padding aside."""
    known = batch.tokens if isinstance(batch, CountedBatch) else None
    if known is not None:
        return known
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return int(mask.sum())
    return int(batch["input_ids"].numel())


def is_labelled(batch: dict[str, Any]) -> bool:
    """Whether every position of a batch has a label."""
    known = batch.labelled if isinstance(batch, CountedBatch) else None
    if known is not None:
        return known
    labels = batch.get("labels")
    return isinstance(labels, Tensor) and not bool((labels == IGNORED_LABEL).any())


class FiniteLoss(Tensor):
    """A loss found to be finite: asked for NaN or infinity, as by `Trainer` after every backward, it answers at once."""

    @classmethod
    def of(cls, loss: Tensor) -> FiniteLoss:
        """The same loss, detached."""
        return loss.detach().as_subclass(cls)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.isnan, torch.isinf):
            return torch.zeros(args[0].shape, dtype=torch.bool)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))
