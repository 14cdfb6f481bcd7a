"""The memory that holds a weight's bfloat16 values while one product reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sbft.grid import values
from sbft.grid.codes import Quantized
from sbft.native.huge_pages import in_huge_pages

LARGEST_KEPT_BYTES = 256 << 20
"""A larger buffer, such as that of an 8B model's whole embedding, is freed as soon as it is not in use."""

_kept: list[Tensor] = []  # at most one; taking it out is atomic, so threads never share it


def in_one_piece(weight: Quantized) -> Quantized:
    """The same weight, copied if it is a view that is spread over another's codes."""
    if all(tensor.is_contiguous() for tensor in weight.tensors.values()):
        return weight
    low = None if weight.low is None else weight.low.contiguous()
    return weight.with_tensors(weight.codes.contiguous(), low, weight.scales.contiguous())


@contextmanager
def dense_values(weight: Quantized) -> Iterator[Tensor]:
    """The bfloat16 values of a weight, in memory that the next weight may take: nothing may keep them or a view of them.

    On a CPU one buffer is kept for all weights, as large as the largest. A second thread, or a use within a use, takes memory
    of its own. Elsewhere torch's caching allocator reuses memory as well, and knows which stream still reads it.
    """
    weight = in_one_piece(weight)
    if weight.codes.device.type != "cpu":
        yield values.dequantize(weight)
        return
    count = weight.shape.numel()
    memory = _take(count)
    try:
        yield values.dequantize(weight, out=memory[:count].view(weight.shape))
    finally:
        _give_back(memory)


def _take(count: int) -> Tensor:
    try:
        memory = _kept.pop()
    except IndexError:
        memory = None
    if memory is not None and memory.numel() >= count:
        return memory
    del memory  # before the larger one is made
    with torch.inference_mode(False):  # or it could be written to in inference mode alone
        return in_huge_pages(torch.empty(count, dtype=torch.bfloat16))


def _give_back(memory: Tensor) -> None:
    if memory.nbytes <= LARGEST_KEPT_BYTES and (not _kept or _kept[0].numel() < memory.numel()):
        _kept[:] = [memory]
