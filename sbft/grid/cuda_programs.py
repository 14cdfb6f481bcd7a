"""The Triton functions that read weights on a grid; layouts as in `sbft.grid.codes`."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_halves(pointers, element, mask):
    """Four bits of each element."""
    both = tl.load(pointers + ((element >> 5) * 16 + (element & 15)), mask, 0).to(tl.uint8, bitcast=True).to(tl.int32)
    return (both >> ((element >> 4) & 1).to(tl.int32) * 4) & 15


@triton.jit
def load_codes(codes, low, element, mask, BITS: tl.constexpr):
    """Codes of elements, given their index in the weight; int32."""
    if BITS == 4:
        return load_halves(codes, element, mask) - 8
    code = tl.load(codes + element, mask, 0).to(tl.int32)
    if BITS == 12:
        code = code * 16 + load_halves(low, element, mask)
    return code


@triton.jit
def dequantize(
    codes,
    low,
    scales,
    values,
    count,
    BITS: tl.constexpr,
    GRID_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the values of a weight, `BLOCK` consecutive elements a program."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < count
    code = load_codes(codes, low, element, mask, BITS)
    scale = tl.load(scales + element // GRID_BLOCK, mask, 1.0)
    value = code.to(tl.float32) * scale.to(tl.float32)
    if (
        values.dtype.element_ty == tl.bfloat16
    ):  # to nearest, as a conversion does on a device but not in the interpreter
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = tl.where(value == value, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(values + element, value, mask)
