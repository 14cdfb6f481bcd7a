"""A weight in blocks, as the reference updates it: views, sums, averages, and the rounding of what is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sbft import rounding
from sbft.grid.codes import Quantized, dequantize
from sbft.grid.tensor import GridTensor
from sbft.grid.update import NEAREST, Noise, second_key, store_moved_
from sbft.optim.sharding import Shard
from sbft.rounding import noise_at, noise_from_key, stochastic_round

BLOCK_ELEMENTS = 1 << 13
"""Elements in a block, so that all temporaries of a step together stay below 1 MiB."""

GPU_BLOCK_ELEMENTS = 1 << 20
"""The same on a GPU, where every operation is a launch, which takes as long as some hundred thousand elements."""

Key = rounding.Key | None
"""Noise key of an update, or None where a weight is rounded to nearest."""

Weight = Tensor | Quantized
"""What an update changes: values, or codes on a grid."""


@dataclass(frozen=True, slots=True)
class Block:
    """A run of consecutive elements of a (B, R, C) tensor: some whole rows, or a piece of one row.

    Attributes:
        index: where the block is in the tensor.
        offset: index of its first element, counted over the whole tensor.
        count: number of elements.
    """

    index: tuple[int, slice, slice]
    offset: int
    count: int


def matrices(tensor: Tensor) -> Tensor:
    """A (B, R, C) view of a tensor of any shape, leading dimensions flattened.

    Raises:
        ValueError: if the strides of a tensor of more than three dimensions allow no such view.
    """
    if tensor.ndim <= 3:
        return tensor[(None,) * (3 - tensor.ndim)]
    try:
        return tensor.view(-1, *tensor.shape[-2:])
    except RuntimeError:
        raise ValueError(
            f"a parameter or gradient of shape {tuple(tensor.shape)} and strides {tensor.stride()} cannot be viewed as a stack "
            "of matrices: make the parameter contiguous"
        ) from None


def stored(weight: Weight) -> Weight:
    """What a weight is stored in: the codes of a weight on a grid; any other weight itself.

    Raises:
        TypeError: if it is a transposed view of a weight on a grid.
    """
    if not isinstance(weight, GridTensor):
        return weight
    if weight.is_transposed:
        raise TypeError("a transposed view of a weight on a grid cannot be updated: update the weight itself")
    return weight.quantized


def opened(weight: Weight) -> Weight:
    """As `stored`, for changes in place: increments the version of a weight on a grid."""
    if isinstance(weight, GridTensor):
        weight.mark_changed()
    return stored(weight)


def version_of(weight: Tensor) -> tuple[int, int]:
    """Where a weight's memory is and how often it was changed: the same pair means the same values."""
    memory = weight.codes if isinstance(weight, GridTensor) else weight
    return memory.data_ptr(), weight._version


def weight_matrices(weight: Weight) -> Weight:
    """A (B, R, C) view, for changes in place, of what a weight of any shape is stored in; see `matrices`."""
    memory = opened(weight)
    return memory.view(-1, weight.shape[-2]) if isinstance(memory, Quantized) else matrices(memory)


def blocks(shape: torch.Size, most: int = BLOCK_ELEMENTS) -> Iterator[Block]:
    """Cut a (B, R, C) shape into blocks of at most `most` elements, in order of their global index."""
    stack, rows, columns = shape
    row_step, column_step = max(1, most // max(columns, 1)), max(1, min(columns, most))
    for b in range(stack):
        for r in range(0, rows, row_step):
            for c in range(0, columns, column_step):
                r_end, c_end = min(r + row_step, rows), min(c + column_step, columns)
                count = (r_end - r) * (c_end - c)
                yield Block((b, slice(r, r_end), slice(c, c_end)), (b * rows + r) * columns + c, count)


def blocks_of(tensor: Weight) -> Iterator[Block]:
    """Cut a (B, R, C) tensor or weight into blocks of a size that suits its device; they cut no block of a grid."""
    return blocks(tensor.shape, BLOCK_ELEMENTS if tensor.device.type in ("cpu", "meta") else GPU_BLOCK_ELEMENTS)


def sum_of_squares(tensor: Weight, values: Callable[[Block], Tensor]) -> Tensor:
    """Sum of the squares of `values(block)` over all blocks of a tensor; float32 of shape ()."""
    total = torch.zeros((), dtype=torch.float32, device=tensor.device)
    for block in blocks_of(tensor):
        total += values(block).square().sum()
    return total


def average_(average: Tensor, value: Tensor, weight: float | Tensor) -> Tensor:
    """Move an average in place towards `value` by `weight`, a number, or a tensor of shape () on its device."""
    if isinstance(weight, Tensor):
        weight = weight.to(average.dtype)  # where a Python number is rounded too
    return average.add_((value - average).mul_(weight))


def values_of(weight: Weight, block: Block) -> Tensor:
    """The values of a block of a (B, R, C) weight; float32 of shape (rows, columns)."""
    if isinstance(weight, Quantized):
        return dequantize(weight.at(block.index), torch.float32)
    return weight[block.index].float()


def move_(
    weight: Weight,
    block: Block,
    direction: Tensor,
    step: Tensor | float,
    decay: Tensor | float,
    key: Key,
    shard: Shard | None,
) -> None:
    """Move a block of a (B, R, C) weight to `value - decay * value - step * direction`, rounded as it is stored."""
    if isinstance(weight, Quantized):
        noise: Noise = (NEAREST, NEAREST)
        if key is not None:
            noise = _noise(weight, block, key, shard), _noise(weight, block, second_key(key), shard)
        store_moved_(weight.at(block.index), direction, noise, step=step, decay=decay)
        return
    values = weight[block.index].float() * (1.0 - decay) - direction * step
    if weight.dtype == torch.bfloat16 and key is not None:
        values = stochastic_round(values, _noise(weight, block, key, shard).view(values.shape))
    weight[block.index].copy_(values)


def _noise(weight: Weight, block: Block, key: rounding.Key, shard: Shard | None) -> Tensor:
    """Noise of a block's elements by their index in the whole parameter; int32 of as many elements."""
    if shard is not None and shard.columns_split:
        b, r, c = block.index
        row = torch.arange(r.start, r.stop, device=weight.device) + b * weight.shape[1]
        column = torch.arange(c.start, c.stop, device=weight.device) + shard.offset
        return noise_at(key, (row[:, None] * shard.shape[-1] + column).view(-1))
    offset = block.offset + (0 if shard is None else shard.offset)
    return noise_from_key(key, block.count, offset, weight.device)


def square_root(values: Tensor) -> Tensor:
    """Correctly rounded square root; torch's, on a CPU, is one float32 step off for one number in 150 (torch 2.13, MKL)."""
    return values.double().sqrt_().float() if values.device.type == "cpu" else values.sqrt()
