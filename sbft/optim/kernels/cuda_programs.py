"""The Triton programs behind `sbft.optim.kernels.cuda`.

The elementwise arithmetic is that of `reference`, operation for operation: launched with `enable_fp_fusion=False`, with
correctly rounded division and square root. Sums are taken in a fixed order (partial sums in memory, then one program adds them
up), so equal inputs give equal bits. `INDEX` is the type of offsets, int32 or int64; the host derives it from the sizes.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from sbft.optim.kernels.cuda_grid import move_codes
from sbft.optim.kernels.cuda_rounding import noise_bits

PARTIALS = tl.constexpr(1024)  # partial sums added at once
SMALLEST_RMS, SMALLEST_RATIO = tl.constexpr(1e-3), tl.constexpr(2.0**-126)  # as in reference

COUNTS = ["partials", "groups", "blocks", "row_blocks", "column_groups", "row_groups", "measure", "key_0", "key_1"]
COUNTS += [
    "weight_square_sum",
    "offset",
    "lr",
    "shrink",
    "average_weight",
    "first_weight",
    "second_weight",
    "momentum_weight",
]
"""Arguments that Triton does not specialize for: one compiled program serves all their values, or addresses."""


@triton.jit
def numbers_of_step(lr, shrink, key_0, key_1, CAPTURED: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Numbers that change from step to step; with `CAPTURED` the arguments are their addresses."""
    if CAPTURED:
        lr, shrink = tl.load(lr).to(tl.float32), tl.load(shrink).to(tl.float32)
        if STOCHASTIC:
            key_0, key_1 = tl.load(key_0), tl.load(key_1)
    return lr, shrink, key_0, key_1


@triton.jit
def weight_of_step(weight, CAPTURED: tl.constexpr):
    """Weight of a step in a moving average; with `CAPTURED` the argument is its address."""
    if CAPTURED:
        weight = tl.load(weight).to(tl.float32)
    return weight


# Rounding


@triton.jit
def bfloat16_bits(values, noise, STOCHASTIC: tl.constexpr):
    """Bits (uint16) of float32 values rounded to bfloat16, stochastically or to nearest even; NaN stays NaN."""
    bits = values.to(tl.uint32, bitcast=True)
    rounded = bits + (noise if STOCHASTIC else 0x7FFF + ((bits >> 16) & 1))
    return tl.where(values == values, rounded >> 16, 0x7FC0).to(tl.uint16)


@triton.jit
def store_weight(pointers, values, base, lane, key_0, key_1, mask, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr):
    """Store float32 values in the weight's dtype; returns the stored values as float32."""
    if pointers.dtype.element_ty == tl.bfloat16:
        noise = noise_bits(base, lane, key_0, key_1, ALIGNED) if STOCHASTIC else 0
        bits = bfloat16_bits(values, noise, STOCHASTIC)
        tl.store(pointers, bits.to(tl.bfloat16, bitcast=True), mask)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        tl.store(pointers, values, mask)
        return values


@triton.jit
def move(
    weight, low, scales, element, update, step, shrink, base, lane, key_0, key_1, mask, write,
    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, BITS: tl.constexpr, GRID_BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Store the new weights of a (rows, columns) tile if `write`; returns the weights afterwards, zero where the mask is not.

    `element` is the index of each in the weight, `base + lane` in the parameter. With `BITS` the weight is on a grid: then
    `weight` points to its codes, and `shrink` is the share by which it shrinks, not what it shrinks to.
    """
    if BITS == 0:
        w = tl.load(weight + element, mask, 0.0).to(tl.float32)
        new = w * shrink - update * step
        stored = store_weight(weight + element, new, base, lane, key_0, key_1, mask & write, STOCHASTIC, ALIGNED)
        stored = tl.where(write, stored, w)
    else:
        stored = move_codes(
            weight, low, scales, element, update, step, shrink, base, lane, key_0, key_1, mask, write, BITS, GRID_BLOCK,
            LARGEST, STOCHASTIC, ALIGNED,
        )  # fmt: skip
    return stored


# Sums over programs


@triton.jit
def sum_partials(partial, partials):
    """Sum, in a fixed order, of `partials` numbers that other programs have written."""
    lane = tl.arange(0, PARTIALS)
    total = tl.zeros([PARTIALS], tl.float32)
    for start in range(0, partials, PARTIALS):
        total += tl.load(partial + start + lane, start + lane < partials, 0.0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit
def is_last(arrivals, partials):
    """Whether all other programs of this launch have arrived here; what they stored before is then visible.

    `arrivals` is a float32 that an earlier launch set to zero.
    """
    tl.debug_barrier()  # all threads of this program have stored before it arrives
    return tl.atomic_add(arrivals, 1.0, sem="acq_rel", scope="gpu") == partials - 1.0


@triton.jit
def average(old, value, weight):
    """A moving average moved towards `value`."""
    return old + (value - old) * weight


@triton.jit
def step_size(update_square_sum, weight_square_sum, count, lr, clip_threshold, RELATIVE: tl.constexpr):
    """As `reference.step_size`."""
    rms = tl.div_rn(tl.sqrt_rn(tl.div_rn(update_square_sum, count)), clip_threshold)
    clip = tl.maximum(rms, 1.0, propagate_nan=tl.PropagateNan.ALL)
    step = lr
    if RELATIVE:
        weight_rms = tl.sqrt_rn(tl.div_rn(weight_square_sum, count))
        step = lr * tl.maximum(weight_rms, SMALLEST_RMS, propagate_nan=tl.PropagateNan.ALL)
    return tl.div_rn(step, clip)
