"""The memory that holds a weight's bfloat16 values while one product reads them.

On a CPU one buffer is kept for all weights, as large as the largest. A second thread, or a nested use, allocates another.
Elsewhere torch's caching allocator reuses memory as well, and knows which stream still reads it.

Meta tensors that stand for those of a CPU use such a buffer too, so that memory planning accounts for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from sbft.grid import values
from sbft.grid.codes import Quantized
from sbft.native.device_type import device_type
from sbft.native.huge_pages import in_huge_pages

LARGEST_KEPT_BYTES = 16 << 20
"""A larger buffer, such as that of a whole output head, is freed as soon as it is not in use."""

_kept: list[Tensor] = []  # at most one; taking it out is atomic, so threads never share it
_planned: list[Tensor] = []  # the same for meta tensors


class Borrowed(NamedTuple):
    """Values in a buffer."""

    dense: Tensor
    """bfloat16, of the weight's shape. Nothing may keep it, or a view of it, once its memory is given back."""
    memory: Tensor | None
    """The buffer, for `give_back`."""


def in_one_piece(weight: Quantized) -> Quantized:
    """The same weight, copied if it is a view without contiguous codes."""
    low = weight.low
    if weight.is_contiguous:
        return weight
    return weight.with_tensors(
        weight.codes.contiguous(), None if low is None else low.contiguous(), weight.scales.contiguous()
    )


def borrow(weight: Quantized) -> Borrowed:
    """The bfloat16 values of a weight, in memory that other weights reuse after `give_back`."""
    weight = in_one_piece(weight)
    if device_type(weight.codes) != "cpu":
        return Borrowed(values.dequantize(weight), None)
    shape = weight.shape
    count = shape.numel()
    memory = _take(count, weight.codes.device)
    return Borrowed(values.dequantize(weight, out=memory[:count].view(shape)), memory)


def give_back(memory: Tensor | None) -> None:
    """Let other weights reuse the memory."""
    if memory is None or memory.nbytes > LARGEST_KEPT_BYTES:
        return
    kept = _kept_on(memory.device)
    if not kept or kept[0].numel() < memory.numel():
        kept[:] = [memory]


@contextmanager
def planned_buffer() -> Iterator[list[Tensor]]:
    """A context in which meta tensors start without a buffer. The list contains the kept buffer while it is not in use."""
    _planned.clear()
    try:
        yield _planned
    finally:
        _planned.clear()


def _kept_on(device: torch.device) -> list[Tensor]:
    return _planned if device.type == "meta" else _kept


def _take(count: int, device: torch.device) -> Tensor:
    try:
        memory = _kept_on(device).pop()
    except IndexError:
        memory = None
    if memory is not None and memory.numel() >= count:
        return memory
    del memory  # free it before allocating the larger one
    with torch.inference_mode(False):  # otherwise only inference mode could write to it
        return in_huge_pages(torch.empty(count, dtype=torch.bfloat16, device=device))
