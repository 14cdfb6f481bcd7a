"""The Triton programs of Adafactor with a factored second moment: four launches per update.

Each is a function of a `Part` or of plain numbers, and the program that launches it for one weight. `cuda_together` has the
programs that launch them for many.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sbft.optim.kernels.cuda_programs import (
    COUNTS,
    SMALLEST_RATIO,
    average,
    is_last,
    move,
    numbers_of_step,
    step_size,
    sum_partials,
    weight_of_step,
)

PARTIAL_ROWS, FACTOR_BLOCK = tl.constexpr(32), tl.constexpr(64)  # tile of partial row and column sums


class Part(NamedTuple):
    """What a program works on: some tiles of rows in one group of columns of one matrix of a stack.

    Programs make it from their arguments, for the reason that `Gradient` has.
    """

    rows: Any
    columns: Any
    stack: Any
    stack_stride: Any  # of the gradient
    row_stride: Any
    column_stride: Any
    tiles: Any
    column_group: Any
    row_group: Any
    b: Any  # the matrix
    program: Any  # place among the programs of the weight


@triton.jit
def part_of_grid(rows, columns, stack_stride, row_stride, column_stride, tiles):
    """The part of a program in a grid of (column groups, row groups, stack)."""
    column_group, row_group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    program = (b * tl.num_programs(1) + row_group) * tl.num_programs(0) + column_group
    return Part(
        rows, columns, tl.num_programs(2), stack_stride, row_stride, column_stride, tiles, column_group, row_group, b, program
    )  # fmt: skip


# Sums


@triton.jit
def sum_rows_and_columns(
    part, grad, scratch, column_sums_at, totals_at,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Sums of the squared gradient of a group of rows and columns: by row, by column, and in all."""
    rows, columns, b, stack = part.rows, part.columns, part.b, part.stack
    c = part.column_group * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    grad += b.to(tl.int64) * part.stack_stride
    column_offsets = c.to(INDEX)[None, :] * part.column_stride
    row_sums = scratch + (part.column_group * stack + b) * rows
    column_square_sums = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for tile in range(0, part.tiles):
        r = (part.row_group * part.tiles + tile) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        g = tl.load(grad + (r.to(INDEX)[:, None] * part.row_stride + column_offsets), mask, 0.0).to(tl.float32)
        square = g * g
        tl.store(row_sums + r, tl.sum(square, axis=1), r < rows)
        column_square_sums += square
    column_sum = tl.sum(column_square_sums, axis=0)
    tl.store(scratch + column_sums_at + (part.row_group * stack + b) * columns + c, column_sum, c < columns)
    tl.store(scratch + totals_at + part.program, tl.sum(column_sum))
    if part.program == 0:
        tl.store(scratch + totals_at - 1, 0.0)  # no program has arrived at the end of the last launch yet


@triton.jit(do_not_specialize=COUNTS)
def row_and_column_sums(
    grad, scratch, rows, columns, stack_stride, row_stride, column_stride, groups, column_sums_at, totals_at,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    part = part_of_grid(rows, columns, stack_stride, row_stride, column_stride, groups)
    sum_rows_and_columns(part, grad, scratch, column_sums_at, totals_at, TILE_ROWS, TILE_COLUMNS, INDEX)


# Averages


@triton.jit
def gather_sums(partial, stride, groups, i, mask):
    """Sum of `groups` rows of partial sums, `stride` apart, at positions `i`."""
    k = tl.arange(0, PARTIAL_ROWS)
    total = tl.zeros([PARTIAL_ROWS, FACTOR_BLOCK], tl.float32)
    for start in range(0, groups, PARTIAL_ROWS):
        inside = (start + k < groups)[:, None] & mask[None, :]
        total += tl.load(partial + (start + k)[:, None] * stride + i[None, :], inside, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def move_factors(
    row, column, mass, scratch, scalars, rows, columns, row_count, column_count, partials, column_groups, row_groups,
    row_blocks, column_sums_at, totals_at, row_means_at, average_weight, eps, block, b, stack,
):  # fmt: skip
    """Update a block of the averages with the sums. The column factors replace the first column sums."""
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
def update_factors(
    row, column, mass, scratch, scalars, rows, columns, row_count, column_count, partials, column_groups, row_groups,
    row_blocks, column_sums_at, totals_at, row_means_at, average_weight, eps, CAPTURED: tl.constexpr,
):  # fmt: skip
    """A grid of (row blocks + column blocks, stack)."""
    average_weight = weight_of_step(average_weight, CAPTURED)
    move_factors(
        row, column, mass, scratch, scalars, rows, columns, row_count, column_count, partials, column_groups, row_groups,
        row_blocks, column_sums_at, totals_at, row_means_at, average_weight, eps, tl.program_id(0), tl.program_id(1),
        tl.num_programs(1),
    )  # fmt: skip


# Size of the update


@triton.jit
def sum_squares_of_update(
    part, grad, row, scratch, row_count, row_blocks, column_factors_at, row_means_at, squares_at,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Sum of the squared unscaled update of each group. The row factors replace the first row sums."""
    rows, columns, b = part.rows, part.columns, part.b
    mean = tl.div_rn(sum_partials(scratch + row_means_at + b * row_blocks, row_blocks), row_count)
    c = part.column_group * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    grad += b.to(tl.int64) * part.stack_stride
    column_offsets = c.to(INDEX)[None, :] * part.column_stride
    column_factor = tl.load(scratch + column_factors_at + b * columns + c, c < columns, 0.0)[None, :]
    square_sum = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for tile in range(0, part.tiles):
        r = (part.row_group * part.tiles + tile) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        g = tl.load(grad + (r.to(INDEX)[:, None] * part.row_stride + column_offsets), mask, 0.0).to(tl.float32)
        ratio = tl.maximum(tl.div_rn(tl.load(row + b * rows + r, r < rows, 1.0), mean), SMALLEST_RATIO)
        row_factor = tl.div_rn(1.0, tl.sqrt_rn(ratio))
        tl.store(scratch + b * rows + r, row_factor, (r < rows) & (part.column_group == 0))
        update = g * row_factor[:, None] * column_factor
        square_sum += update * update
    tl.store(scratch + squares_at + part.program, tl.sum(square_sum))


@triton.jit(do_not_specialize=COUNTS)
def update_square_sums(
    grad, row, scratch, rows, columns, row_count, stack_stride, row_stride, column_stride, groups, row_blocks,
    column_factors_at, row_means_at, squares_at,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    part = part_of_grid(rows, columns, stack_stride, row_stride, column_stride, groups)
    sum_squares_of_update(
        part, grad, row, scratch, row_count, row_blocks, column_factors_at, row_means_at, squares_at, TILE_ROWS,
        TILE_COLUMNS, INDEX,
    )  # fmt: skip


# The weights


@triton.jit
def step_of_update(
    weight_square_sum,
    scratch,
    scalars,
    partials,
    measure,
    squares_at,
    count,
    lr,
    clip_threshold,
    RELATIVE: tl.constexpr,
):
    """The step size, and whether weights are stored."""
    update_square_sum = sum_partials(scratch + squares_at, partials)
    step = step_size(update_square_sum, tl.load(weight_square_sum), count, lr, clip_threshold, RELATIVE)
    return step, (tl.load(scalars) < float("inf")) & (measure == 0)


@triton.jit
def move_tiles(
    part, weight, low, scales, grad, scratch, column_factors_at, step, shrink, key_0, key_1, offset, write,
    STOCHASTIC: tl.constexpr, RELATIVE: tl.constexpr, SHARDED: tl.constexpr, ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, INDEX: tl.constexpr,
    BITS: tl.constexpr, GRID_BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Store the new weights of a part if `write`; returns the sum of the squares of its weights afterwards, with `RELATIVE`.

    `offset` is the global index of the first element. It is used only with `SHARDED`, because adding it costs registers.
    """
    rows, columns, b = part.rows, part.columns, part.b
    c = part.column_group * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    grad += b.to(tl.int64) * part.stack_stride
    column_offsets = c.to(INDEX)[None, :] * part.column_stride
    column_factor = tl.load(scratch + column_factors_at + b * columns + c, c < columns, 0.0)[None, :]
    square_sum = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for tile in range(0, part.tiles):
        r = (part.row_group * part.tiles + tile) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        base = ((b * rows).to(INDEX) + r)[:, None] * columns
        g = tl.load(grad + (r.to(INDEX)[:, None] * part.row_stride + column_offsets), mask, 0.0).to(tl.float32)
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
    return tl.sum(square_sum)


@triton.jit
def end_update(
    part, square_sum, write, mass, scratch, scalars, partials, totals_at, weight_squares_at, average_weight,
    RELATIVE: tl.constexpr,
):  # fmt: skip
    """Store the mass, and with `RELATIVE` the sum of the squared weights."""
    if RELATIVE:
        tl.store(scratch + weight_squares_at + part.program, square_sum)
        if is_last(scratch + totals_at - 1, partials):
            tl.store(scalars + 1, sum_partials(scratch + weight_squares_at, partials))
            tl.store(scratch + totals_at - 1, 0.0)
    if write & (part.program == 0):  # no other program reads it in this launch
        tl.store(mass, average(tl.load(mass), 1.0, average_weight))


@triton.jit(do_not_specialize=COUNTS)
def apply_factored(
    weight, low, scales, grad, mass, weight_square_sum, scratch, scalars, rows, columns, stack_stride, row_stride,
    column_stride, groups, partials, measure, column_factors_at, totals_at, squares_at, weight_squares_at, count,
    average_weight, lr, shrink, clip_threshold, key_0, key_1, offset,
    STOCHASTIC: tl.constexpr, RELATIVE: tl.constexpr, SHARDED: tl.constexpr, CAPTURED: tl.constexpr, ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, INDEX: tl.constexpr,
    BITS: tl.constexpr, GRID_BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Store the new weights and, with `RELATIVE`, the sum of their squares; with `measure` only that sum, of the old weights.

    With `CAPTURED`, `lr`, `shrink`, `average_weight` and the words of the key are addresses, so that each replay of a graph
    reads the numbers of its step.
    """
    lr, shrink, key_0, key_1 = numbers_of_step(lr, shrink, key_0, key_1, CAPTURED, STOCHASTIC)
    average_weight = weight_of_step(average_weight, CAPTURED)
    part = part_of_grid(rows, columns, stack_stride, row_stride, column_stride, groups)
    step, write = step_of_update(
        weight_square_sum, scratch, scalars, partials, measure, squares_at, count, lr, clip_threshold, RELATIVE
    )
    square_sum = move_tiles(
        part, weight, low, scales, grad, scratch, column_factors_at, step, shrink, key_0, key_1, offset, write, STOCHASTIC,
        RELATIVE, SHARDED, ALIGNED, TILE_ROWS, TILE_COLUMNS, INDEX, BITS, GRID_BLOCK, LARGEST,
    )  # fmt: skip
    end_update(
        part,
        square_sum,
        write,
        mass,
        scratch,
        scalars,
        partials,
        totals_at,
        weight_squares_at,
        average_weight,
        RELATIVE,
    )
