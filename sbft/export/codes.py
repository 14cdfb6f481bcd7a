"""The codes of a weight on a grid as other formats store them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbft.grid.codes import Quantized, load_codes

_GGUF_BLOCK = 32


def gguf_blocks(weight: Quantized, bits: int) -> NDArray[np.uint8]:
    """The bytes of Q8_0 or Q4_0: for every 32 elements of a row, the float16 scale and then the codes.

    A larger block becomes several with the same scale. Codes of Q4_0 are packed as sbft packs them.

    Args:
        weight: of shape (..., C), on a grid of at most `bits` bits.
        bits: 8 for Q8_0, 4 for Q4_0.

    Returns:
        Shape (..., C / 32 * 34), or (..., C / 32 * 18).
    """
    codes = weight.codes if weight.grid.bits == bits else load_codes(weight).to(torch.int8)
    count = weight.shape[-1] // _GGUF_BLOCK
    scales = spread(weight.scales, weight.block // _GGUF_BLOCK).view(torch.uint8).unflatten(-1, (count, 2))
    blocks = torch.cat((scales, codes.contiguous().view(torch.uint8).unflatten(-1, (count, -1))), dim=-1)
    encoded: NDArray[np.uint8] = blocks.flatten(-2).numpy()
    return encoded


def packed(weight: Quantized) -> Tensor:
    """Codes in 32-bit words as `compressed-tensors` packs them: plus 2^(bits - 1), the first element in the lowest bits.

    Args:
        weight: of shape (..., C), on a grid of 4 or 8 bits.

    Returns:
        int32 of shape (..., C / 8) or (..., C / 4).
    """
    unsigned = load_codes(weight) + (1 << (weight.grid.bits - 1))
    if weight.grid.bits == 4:
        pairs = unsigned.unflatten(-1, (-1, 2))
        unsigned = pairs[..., 0] | pairs[..., 1] << 4
    return unsigned.to(torch.uint8).contiguous().view(torch.int32)


def spread(scales: Tensor, times: int) -> Tensor:
    """Repeat scales for blocks that are each cut into `times` smaller ones: (..., blocks) to (..., blocks * times)."""
    return scales.repeat_interleave(times, dim=-1)


def reordered(weight: Quantized, reorder: Callable[[Tensor], Tensor]) -> Quantized:
    """A weight whose rows are in another order.

    Args:
        weight: of shape (R, C).
        reorder: puts the rows of any tensor of shape (R, ...) in the new order.
    """
    low = None if weight.low is None else reorder(weight.low)
    return weight.with_tensors(reorder(weight.codes), low, reorder(weight.scales))
