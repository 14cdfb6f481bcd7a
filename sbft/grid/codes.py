"""Storage of a weight on a grid: quantizing, packing and unpacking codes, and reading values back.

The value of an element is its code times the scale of its block. A code has at most 11 bits and a float16 scale has 11, so the
product is exact in float32. bfloat16 values are that product rounded to nearest, ties to even.

Layouts, for rows of C elements (C is a multiple of 32):

- up to 4 bits: `codes` is uint8 of C / 2 per row. Each 32 elements take 16 bytes: byte j has element j in its low half and
  element 16 + j in its high half, both as code + 8. These are the codes of GGUF's Q4_0.
- up to 8 bits: `codes` is int8 of C per row.
- up to 12 bits: `codes` is int8 of C per row with the upper eight bits (code >> 4), and `low` is uint8 of C / 2 per row with
  the lower four bits (code & 15), in the order of the 4-bit layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sbft.grid.formats import GROUP, Grid, fits
from sbft.native.device_type import device_type

_HALF = GROUP // 2
_NIBBLE_ZERO = 8  # how a code of zero is stored in four bits
_SMALLEST_SCALE_BITS = 1  # 2^-24, the smallest float16 above zero
_CHUNK_ELEMENTS = 1 << 13
_GPU_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight of shape (..., C) on a grid; its tensors are changed in place by updates.

    Attributes:
        grid: the grid.
        codes: int8 (..., C), or uint8 (..., C / 2) on a grid of 4 bits.
        low: the lower four bits, uint8 (..., C / 2), on a grid of 12 bits; else None.
        scales: float16 (..., C / block). A scale is positive; NaN marks a block that holds no numbers, its codes are 0.
    """

    grid: Grid
    codes: Tensor
    low: Tensor | None
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return torch.Size((*self.codes.shape[:-1], self._columns))

    @property
    def _columns(self) -> int:
        stored = self.codes.shape[-1]
        return 2 * stored if self.grid.bits == 4 else stored

    @property
    def block(self) -> int:
        """Elements under one scale."""
        return self._columns // self.scales.shape[-1]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.codes.device

    def numel(self) -> int:
        """Number of elements of the weight."""
        return self.shape.numel()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, by name."""
        stored = {"codes": self.codes, "scales": self.scales}
        return stored if self.low is None else {**stored, "low": self.low}

    @property
    def is_contiguous(self) -> bool:
        """Whether each of its tensors is in one piece of memory, as compiled code takes them."""
        low = self.low
        return self.codes.is_contiguous() and self.scales.is_contiguous() and (low is None or low.is_contiguous())

    def with_tensors(self, codes: Tensor, low: Tensor | None, scales: Tensor) -> Quantized:
        """The same grid with other tensors."""
        return replace(self, codes=codes, low=low, scales=scales)

    def rows(self, start: int, stop: int) -> Quantized:
        """A view of entries `start` to `stop` of the first dimension."""
        low = None if self.low is None else self.low[start:stop]
        return self.with_tensors(self.codes[start:stop], low, self.scales[start:stop])

    def at(self, index: tuple[int, slice, slice]) -> Quantized:
        """A view of rows and columns of one matrix of a (B, R, C) weight; columns are cut between blocks only."""
        b, rows, columns = index
        start, stop = columns.start, columns.stop
        halves, blocks = slice(start // 2, stop // 2), slice(start // self.block, stop // self.block)
        low = None if self.low is None else self.low[b, rows, halves]
        codes = self.codes[b, rows, halves if self.grid.bits == 4 else columns]
        return self.with_tensors(codes, low, self.scales[b, rows, blocks])

    def gather(self, index: Tensor) -> Quantized:
        """A copy of the entries `index` (integers, any shape) of the first dimension: shape (*index.shape, ..., C)."""
        low = None if self.low is None else self.low[index]
        return self.with_tensors(self.codes[index], low, self.scales[index])

    def view(self, *leading: int) -> Quantized:
        """A view with other leading dimensions: shape (*leading, C)."""
        low = None if self.low is None else self.low.view(*leading, self.low.shape[-1])
        codes, scales = (
            self.codes.view(*leading, self.codes.shape[-1]),
            self.scales.view(*leading, self.scales.shape[-1]),
        )
        return self.with_tensors(codes, low, scales)

    def flat(self) -> Quantized:
        """A view of shape (rows, C), leading dimensions flattened."""
        return self.view(-1)


def empty(grid: Grid, shape: torch.Size | tuple[int, ...], device: torch.device | str | None = None) -> Quantized:
    """A weight of `shape` on a grid with uninitialized tensors.

    Raises:
        ValueError: if no weight of this shape can be on a grid.
    """
    if not fits(shape):
        raise ValueError(
            f"a weight of shape {tuple(shape)} cannot be on a grid: it must have two dimensions or more, the last one a "
            f"multiple of {GROUP}"
        )
    *leading, columns = shape
    halves = (*leading, columns // 2)
    scales = torch.empty((*leading, columns // grid.block_of(columns)), dtype=torch.float16, device=device)
    if grid.bits == 4:
        return Quantized(grid, torch.empty(halves, dtype=torch.uint8, device=device), None, scales)
    codes = torch.empty(tuple(shape), dtype=torch.int8, device=device)
    low = torch.empty(halves, dtype=torch.uint8, device=device) if grid.bits == 12 else None
    return Quantized(grid, codes, low, scales)


def smallest_scale(largest_value: Tensor, largest_code: int) -> Tensor:
    """The smallest float16 whose `largest_code`-fold is at least `largest_value`; at least 2^-24.

    Args:
        largest_value: float32, not negative, any shape.
        largest_code: the grid's largest code.

    Returns:
        float16 of the same shape; NaN where the value is not finite, or so large that no float16 is enough.
    """
    nearest = (largest_value / largest_code).to(torch.float16)
    # The product is exact, so this compares without rounding. The nearest float16 is at most one step too small.
    too_small = nearest.float() * largest_code < largest_value
    bits = (nearest.view(torch.int16) + too_small.to(torch.int16)).clamp_(min=_SMALLEST_SCALE_BITS)
    scale = bits.view(torch.float16)
    return torch.where(torch.isfinite(largest_value) & torch.isfinite(scale), scale, torch.nan)


def quantize(values: Tensor, grid: Grid) -> Quantized:
    """Store a tensor on a grid: the smallest scale that reaches a block's largest value, each value rounded to nearest.

    Ties go to even codes. A block that holds NaN or an infinity, or a value that the largest float16 scale does not reach,
    gets the scale NaN.

    Args:
        values: float32, bfloat16 or float16 of shape (..., C).
        grid: the grid.

    Raises:
        ValueError: if no tensor of this shape can be on a grid.
    """
    made = empty(grid, values.shape, values.device)
    flat, source = made.flat(), values.reshape(-1, values.shape[-1])
    for start, stop in chunks(flat):
        blocks = source[start:stop].float().unflatten(-1, (-1, made.block))
        scales = smallest_scale(blocks.abs().amax(dim=-1), grid.largest)
        quotient = blocks / scales.float()[..., None]
        # No clamping: a value is at most `largest` times its scale, and so the quotient at most `largest`.
        codes = torch.where(torch.isnan(scales)[..., None], 0.0, quotient.round()).to(torch.int32)
        store_codes(flat.rows(start, stop), codes.flatten(-2))
        flat.scales[start:stop] = scales
    return made


def dequantize(weight: Quantized, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None) -> Tensor:
    """The values of a weight.

    Args:
        weight: of shape (..., C).
        dtype: float32, exact, or bfloat16, rounded to nearest.
        out: where to write them: contiguous, of the weight's shape; its dtype is used.

    Returns:
        `out`, or a new tensor of the weight's shape.
    """
    values = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device) if out is None else out
    flat, target = weight.flat(), values.view(-1, values.shape[-1])
    for start, stop in chunks(flat):
        rows = flat.rows(start, stop)
        blocks = load_codes(rows).float().unflatten(-1, (-1, weight.block))
        target[start:stop] = (blocks * rows.scales.float()[..., None]).flatten(-2)
    return values


def dequantize_entries(weight: Quantized, index: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The values of some entries of a weight's first dimension, such as the embeddings of tokens.

    Args:
        weight: of shape (N, ..., C).
        index: integers from 0 to N - 1, any shape.
        dtype: float32 or bfloat16.

    Returns:
        A new tensor of shape (*index.shape, ..., C).

    Raises:
        IndexError: if an index is out of range.
    """
    return dequantize(weight.gather(index), dtype)


def elements(weight: Quantized, positions: Tensor) -> Tensor:
    """The exact values of some elements.

    Args:
        weight: the weight, contiguous.
        positions: int64 of shape (K,), in the flattened weight.

    Returns:
        float32 of shape (K,).
    """
    groups = positions // GROUP
    low = None if weight.low is None else weight.low.view(-1, _HALF)[groups]
    codes = weight.codes.view(-1, _HALF if weight.grid.bits == 4 else GROUP)[groups]
    scales = weight.scales.view(-1)[positions // weight.block]
    read = weight.with_tensors(codes, low, scales[:, None])
    return dequantize(read, torch.float32).gather(1, (positions % GROUP)[:, None]).squeeze(1)


def square_sum(weight: Quantized) -> Tensor:
    """Sum of the squared values; float32 of shape ()."""
    flat = weight.flat()
    total = torch.zeros((), dtype=torch.float32, device=weight.codes.device)
    for start, stop in chunks(flat):
        total += dequantize(flat.rows(start, stop), torch.float32).square().sum()
    return total


def chunks(flat: Quantized) -> Iterator[tuple[int, int]]:
    """Cut the rows of a (rows, C) weight into runs whose float32 temporaries stay small: pairs (start, stop).

    On the meta device, which only measures memory, the first run is enough.
    """
    rows, columns = flat.shape
    most = _CHUNK_ELEMENTS if device_type(flat.codes) in ("cpu", "meta") else _GPU_CHUNK_ELEMENTS
    each = max(1, most // columns)
    starts = range(0, rows, each)
    for start in starts[:1] if flat.codes.device.type == "meta" else starts:
        yield start, min(start + each, rows)


def load_codes(weight: Quantized) -> Tensor:
    """The codes of a weight; int32 of its shape."""
    if weight.grid.bits == 4:
        return _unpack_halves(weight.codes) - _NIBBLE_ZERO
    codes = weight.codes.to(torch.int32)
    return codes if weight.low is None else codes * 16 + _unpack_halves(weight.low)


def store_codes(weight: Quantized, codes: Tensor) -> None:
    """Write codes (integers of the weight's shape, -largest to largest) into a weight's tensors."""
    if weight.grid.bits == 4:
        weight.codes.copy_(_pack_halves(codes + _NIBBLE_ZERO))
    elif weight.low is None:
        weight.codes.copy_(codes)
    else:
        weight.codes.copy_(codes >> 4)
        weight.low.copy_(_pack_halves(codes & 15))


def _pack_halves(nibbles: Tensor) -> Tensor:
    """Integers from 0 to 15 of shape (..., C) to uint8 of shape (..., C / 2), 32 elements to 16 bytes."""
    groups = nibbles.unflatten(-1, (-1, 2, _HALF))
    return (groups[..., 0, :] | groups[..., 1, :] << 4).to(torch.uint8).flatten(-2)


def _unpack_halves(packed: Tensor) -> Tensor:
    """The inverse of `_pack_halves`; int32."""
    groups = packed.to(torch.int32).unflatten(-1, (-1, 1, _HALF))
    return torch.cat((groups & 15, groups >> 4), dim=-2).flatten(-3)
