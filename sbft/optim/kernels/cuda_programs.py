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
PARTIAL_ROWS, FACTOR_BLOCK = tl.constexpr(32), tl.constexpr(64)  # tile of partial row and column sums
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


# Adafactor with a factored second moment: four launches, each a grid of (column groups, row groups, stack)


@triton.jit
def linear_program_id():
    return (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)


@triton.jit(do_not_specialize=COUNTS)
def row_and_column_sums(
    grad,
    scratch,
    rows,
    columns,
    stack_stride,
    row_stride,
    column_stride,
    groups,
    column_sums_at,
    totals_at,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Sums of the squared gradient of a group of rows and columns: by row, by column, and in all."""
    column_group, row_group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stack = tl.num_programs(2)
    c = column_group * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    grad += b.to(tl.int64) * stack_stride
    column_offsets = c.to(INDEX)[None, :] * column_stride
    row_sums = scratch + (column_group * stack + b) * rows
    column_square_sums = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for tile in range(0, groups):
        r = (row_group * groups + tile) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        g = tl.load(grad + (r.to(INDEX)[:, None] * row_stride + column_offsets), mask, 0.0).to(tl.float32)
        square = g * g
        tl.store(row_sums + r, tl.sum(square, axis=1), r < rows)
        column_square_sums += square
    column_sum = tl.sum(column_square_sums, axis=0)
    tl.store(scratch + column_sums_at + (row_group * stack + b) * columns + c, column_sum, c < columns)
    program = linear_program_id()
    tl.store(scratch + totals_at + program, tl.sum(column_sum))
    if program == 0:
        tl.store(scratch + totals_at - 1, 0.0)  # no program has arrived at the end of the last launch yet


@triton.jit
def gather_sums(partial, stride, groups, i, mask):
    """Sum of `groups` rows of partial sums, `stride` apart, at positions `i`."""
    k = tl.arange(0, PARTIAL_ROWS)
    total = tl.zeros([PARTIAL_ROWS, FACTOR_BLOCK], tl.float32)
    for start in range(0, groups, PARTIAL_ROWS):
        inside = (start + k < groups)[:, None] & mask[None, :]
        total += tl.load(partial + (start + k)[:, None] * stride + i[None, :], inside, 0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=COUNTS)
def update_factors(
    row,
    column,
    mass,
    scratch,
    scalars,
    rows,
    columns,
    row_count,
    column_count,
    partials,
    column_groups,
    row_groups,
    row_blocks,
    column_sums_at,
    totals_at,
    row_means_at,
    average_weight,
    eps,
    CAPTURED: tl.constexpr,
):
    """Update the averages with the sums. The column factors replace the first column sums.

    A grid of (row blocks + column blocks, stack).
    """
    average_weight = weight_of_step(average_weight, CAPTURED)
    block, b, stack = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    total = sum_partials(scratch + totals_at, partials)
    finite = total < float("inf")
    if (block == 0) & (b == 0):
        tl.store(scalars, total)
    if block < row_blocks:
        i = block * FACTOR_BLOCK + tl.arange(0, FACTOR_BLOCK)
        mask = i < rows
        row_sum = gather_sums(scratch + b * rows, stack * rows, column_groups, i, mask)
        old = tl.load(row + b * rows + i, mask, 0.0)
        new = average(old, tl.div_rn(row_sum, column_count) + eps, average_weight)
        tl.store(row + b * rows + i, new, mask & finite)
        tl.store(scratch + row_means_at + b * row_blocks + block, tl.sum(tl.where(mask, new, 0.0)))
    else:
        i = (block - row_blocks) * FACTOR_BLOCK + tl.arange(0, FACTOR_BLOCK)
        mask = i < columns
        column_sums = scratch + column_sums_at + b * columns
        column_sum = gather_sums(column_sums, stack * columns, row_groups, i, mask)
        old = tl.load(column + b * columns + i, mask, 0.0)
        new = average(old, tl.div_rn(column_sum, row_count) + eps, average_weight)
        tl.store(column + b * columns + i, new, mask & finite)
        new_mass = average(tl.load(mass), 1.0, average_weight)
        tl.debug_barrier()  # all threads have read the sums before they are overwritten
        tl.store(column_sums + i, tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(new, new_mass))), mask)


@triton.jit(do_not_specialize=COUNTS)
def update_square_sums(
    grad,
    row,
    scratch,
    rows,
    columns,
    row_count,
    stack_stride,
    row_stride,
    column_stride,
    groups,
    row_blocks,
    column_factors_at,
    row_means_at,
    squares_at,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Sum of the squared unscaled update of each group. The row factors replace the first row sums."""
    column_group, row_group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    mean = tl.div_rn(sum_partials(scratch + row_means_at + b * row_blocks, row_blocks), row_count)
    c = column_group * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    grad += b.to(tl.int64) * stack_stride
    column_offsets = c.to(INDEX)[None, :] * column_stride
    column_factor = tl.load(scratch + column_factors_at + b * columns + c, c < columns, 0.0)[None, :]
    square_sum = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for tile in range(0, groups):
        r = (row_group * groups + tile) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        g = tl.load(grad + (r.to(INDEX)[:, None] * row_stride + column_offsets), mask, 0.0).to(tl.float32)
        ratio = tl.maximum(tl.div_rn(tl.load(row + b * rows + r, r < rows, 1.0), mean), SMALLEST_RATIO)
        row_factor = tl.div_rn(1.0, tl.sqrt_rn(ratio))
        tl.store(scratch + b * rows + r, row_factor, (r < rows) & (column_group == 0))
        update = g * row_factor[:, None] * column_factor
        square_sum += update * update
    tl.store(scratch + squares_at + linear_program_id(), tl.sum(square_sum))


@triton.jit(do_not_specialize=COUNTS)
def apply_factored(
    weight,
    low,
    scales,
    grad,
    mass,
    weight_square_sum,
    scratch,
    scalars,
    rows,
    columns,
    stack_stride,
    row_stride,
    column_stride,
    groups,
    partials,
    measure,
    column_factors_at,
    totals_at,
    squares_at,
    weight_squares_at,
    count,
    average_weight,
    lr,
    shrink,
    clip_threshold,
    key_0,
    key_1,
    offset,
    STOCHASTIC: tl.constexpr,
    RELATIVE: tl.constexpr,
    SHARDED: tl.constexpr,
    CAPTURED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    GRID_BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Store the new weights and, with `RELATIVE`, the sum of their squares; with `measure` only that sum, of the old weights.

    `offset` is the global index of the first element. It is used only with `SHARDED`, because adding it costs registers. With
    `CAPTURED`, `lr`, `shrink`, `average_weight` and the words of the key are addresses, so that each replay of a graph reads
    the numbers of its step.
    """
    lr, shrink, key_0, key_1 = numbers_of_step(lr, shrink, key_0, key_1, CAPTURED, STOCHASTIC)
    average_weight = weight_of_step(average_weight, CAPTURED)
    column_group, row_group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    write = (tl.load(scalars) < float("inf")) & (measure == 0)
    update_square_sum = sum_partials(scratch + squares_at, partials)
    step = step_size(update_square_sum, tl.load(weight_square_sum), count, lr, clip_threshold, RELATIVE)
    c = column_group * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    grad += b.to(tl.int64) * stack_stride
    column_offsets = c.to(INDEX)[None, :] * column_stride
    column_factor = tl.load(scratch + column_factors_at + b * columns + c, c < columns, 0.0)[None, :]
    square_sum = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for tile in range(0, groups):
        r = (row_group * groups + tile) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        base = ((b * rows).to(INDEX) + r)[:, None] * columns
        g = tl.load(grad + (r.to(INDEX)[:, None] * row_stride + column_offsets), mask, 0.0).to(tl.float32)
        row_factor = tl.load(scratch + b * rows + r, r < rows, 0.0)[:, None]
        update = g * row_factor * column_factor
        noise_base = base
        if SHARDED:
            noise_base = base + offset
        stored = move(
            weight, low, scales, base + c[None, :], update, step, shrink, noise_base, c[None, :], key_0, key_1, mask, write,
            STOCHASTIC, ALIGNED, BITS, GRID_BLOCK, LARGEST,
        )  # fmt: skip
        if RELATIVE:
            square_sum += stored * stored  # zero where the mask is false
    if RELATIVE:
        tl.store(scratch + weight_squares_at + linear_program_id(), tl.sum(square_sum))
        if is_last(scratch + totals_at - 1, partials):
            tl.store(scalars + 1, sum_partials(scratch + weight_squares_at, partials))
            tl.store(scratch + totals_at - 1, 0.0)
    if write & (linear_program_id() == 0):  # no other program reads it in this launch
        tl.store(mass, average(tl.load(mass), 1.0, average_weight))
