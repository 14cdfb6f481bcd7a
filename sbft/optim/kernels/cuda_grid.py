"""The Triton functions that move weights on a grid, as `sbft.grid.update` defines it; layouts as in `sbft.grid.codes`."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from sbft.grid.cuda_programs import load_codes
from sbft.optim.kernels.cuda_rounding import noise_bits

_BEYOND = tl.constexpr(float(1 << 30))
_WHOLE = tl.constexpr(float(1 << 23))  # from here on every float32 is whole


@triton.jit
def round_to_even(x):
    """Float32 rounded to whole numbers, ties to even."""
    size = tl.abs(x)
    rounded = tl.where(size < _WHOLE, (size + _WHOLE) - _WHOLE, size)
    return tl.where(x < 0, -rounded, rounded)


@triton.jit
def smallest_scale(largest_value, LARGEST: tl.constexpr):
    """As `sbft.grid.codes.smallest_scale`; float16."""
    nearest = tl.div_rn(largest_value, largest_value * 0 + LARGEST).to(tl.float16)
    too_small = nearest.to(tl.float32) * LARGEST < largest_value
    bits = nearest.to(tl.int16, bitcast=True) + too_small.to(tl.int16)
    bits = tl.maximum(bits, 1)
    finite = (largest_value < float("inf")) & (bits < 0x7C00)
    return tl.where(finite, bits, 0x7E00).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def split_groups(x):
    """First and second 16 of each 32 elements of a (rows, columns) tile."""
    GROUPS: tl.constexpr = x.shape[0] * x.shape[1] // 32
    return tl.split(tl.permute(tl.reshape(x, [GROUPS, 2, 16]), [0, 2, 1]))


@triton.jit
def store_halves(pointers, element, values, mask):
    """Four bits of each element of a tile, which consists of whole groups of 32."""
    place, _ = split_groups(element)
    first, second = split_groups(values)
    wanted, _ = split_groups(mask.to(tl.int32))
    both = (first | (second << 4)).to(tl.uint8)
    both = both.to(pointers.dtype.element_ty, bitcast=True)
    tl.store(pointers + ((place >> 5) * 16 + (place & 15)), both, wanted != 0)


@triton.jit
def store_codes(codes, low, element, values, mask, BITS: tl.constexpr):
    """Write codes (int32)."""
    if BITS == 4:
        store_halves(codes, element, values + 8, mask)
    elif BITS == 8:
        tl.store(codes + element, values.to(tl.int8), mask)
    else:
        tl.store(codes + element, (values >> 4).to(tl.int8), mask)
        store_halves(low, element, values & 15, mask)


@triton.jit
def largest_of_block(x, BLOCK: tl.constexpr):
    """The largest value of each block, in the place of each of its elements; of a (rows, columns) tile of whole blocks."""
    BLOCKS: tl.constexpr = x.shape[0] * x.shape[1] // BLOCK
    most = tl.max(tl.reshape(x, [BLOCKS, BLOCK]), axis=1)
    return tl.reshape(tl.broadcast_to(most[:, None], [BLOCKS, BLOCK]), [x.shape[0], x.shape[1]])


@triton.jit
def rounded(fixed, base, lane, key_0, key_1, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr):
    """Codes of fixed point numbers (int32)."""
    noise = 32768
    if STOCHASTIC:
        noise = noise_bits(base, lane, key_0, key_1, ALIGNED).to(tl.int32)
    return (fixed + noise) >> 16


@triton.jit
def move_codes(
    codes,
    low,
    scales,
    element,
    direction,
    step,
    decay,
    base,
    lane,
    key_0,
    key_1,
    mask,
    write,
    BITS: tl.constexpr,
    GRID_BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Move a (rows, columns) tile of whole blocks; returns its values afterwards (float32).

    `element` is the index of each in the weight, `base + lane` in the parameter. `mask` is the same for a whole block. Nothing
    is stored unless `write`.
    """
    code = load_codes(codes, low, element, mask, BITS)
    scale = tl.load(scales + element // GRID_BLOCK, mask, 1.0)
    wide = scale.to(tl.float32)
    before = tl.where(mask, code.to(tl.float32) * wide, 0.0)
    distance = direction * tl.div_rn(wide * 0 + step, wide) + code.to(tl.float32) * decay
    fixed = round_to_even(distance * 65536.0)
    near = tl.abs(fixed) < _BEYOND  # false for NaN
    exact = code * 65536 - tl.where(near, fixed, _BEYOND).to(tl.int32)
    new = rounded(exact, base, lane, key_0, key_1, STOCHASTIC, ALIGNED)
    out = tl.where(mask & (tl.abs(new) > LARGEST), 1, 0)
    if tl.max(tl.max(out, axis=1), axis=0) > 0:
        grows = largest_of_block(out, GRID_BLOCK) > 0
        wanted = tl.where(near, new.to(tl.float32), code.to(tl.float32) - distance)
        lost = largest_of_block(tl.where(wanted != wanted, 1, 0), GRID_BLOCK) > 0
        farthest = largest_of_block(tl.where(wanted == wanted, tl.abs(wanted), 0.0), GRID_BLOCK)
        grown = smallest_scale(tl.where(lost, float("inf"), farthest * wide), LARGEST)
        scaled = wanted * tl.div_rn(wide, grown.to(tl.float32)) * 65536.0
        fits = scaled == scaled
        again = tl.where(fits, round_to_even(scaled), 0.0).to(tl.int32)
        again = rounded(again, base, lane, key_1, key_0, STOCHASTIC, ALIGNED)
        again = tl.where(fits, tl.minimum(tl.maximum(again, -LARGEST), LARGEST), 0)
        new = tl.where(grows, again, new)
        scale = tl.where(grows, grown, scale)
        tl.store(scales + element // GRID_BLOCK, scale, mask & write & grows & (element % GRID_BLOCK == 0))
    store_codes(codes, low, element, new, mask & write, BITS)
    return tl.where(write, tl.where(mask, new.to(tl.float32) * scale.to(tl.float32), 0.0), before)
