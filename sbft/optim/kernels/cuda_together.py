"""The Triton programs that update many weights in one launch: those of `cuda_factored` and `cuda_elementwise`, once per weight.

A grid has the programs of the largest weight in its first dimension, and one weight per index of its second. What a program
needs to know of its weight is in a record, a row of a table in device memory (int64): first the addresses of gradient and known
sum of squares, where its scratch memory begins, and the words of its key; then what stays from step to step. Numbers that are
multiples of 16 are in units of that, and sizes in units of `UNIT`, so that Triton sees what they divide by and gives a weight
the same layouts, and so the same order of sums, as in a launch of its own.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from sbft.optim.kernels.cuda_elementwise import (
    apply_adamw,
    apply_full,
    apply_sgd,
    grad_square_sums,
    update_full_moment,
)
from sbft.optim.kernels.cuda_factored import (
    Part,
    end_update,
    move_factors,
    move_tiles,
    step_of_update,
    sum_rows_and_columns,
    sum_squares_of_update,
)

# Fields of every record
GRADIENT, KNOWN_SUM, SCRATCH, KEY_0, KEY_1 = (tl.constexpr(i) for i in range(5))
VALUES, LOW_BITS, SCALES_AT, SUMS = (tl.constexpr(i) for i in range(5, 9))
# of a matrix; those of groups are followed by the number of their tiles
ROW, COLUMN, MASS, ROWS, COLUMNS, STACK, COLUMN_GROUPS, SUM_GROUPS = (tl.constexpr(i) for i in range(9, 17))
APPLY_GROUPS, ROW_BLOCKS, COLUMN_BLOCKS = tl.constexpr(18), tl.constexpr(20), tl.constexpr(21)
COLUMN_SUMS_AT, TOTALS_AT, ROW_MEANS_AT, SQUARES_AT, WEIGHT_SQUARES_AT = (tl.constexpr(i) for i in range(22, 27))
# and of a line, after its state
FIRST, SECOND, THIRD, FOURTH, COUNT, BLOCKS, PROGRAMS, SECTION = (tl.constexpr(i) for i in range(9, 17))
FACTORED_WIDTH, LINE_WIDTH = tl.constexpr(27), tl.constexpr(17)

_COUNTS = ["measure", "lr", "shrink", "average_weight", "first_weight", "second_weight", "momentum_weight"]
"""Arguments that Triton does not specialize for."""


@triton.jit
def number(record, FIELD: tl.constexpr):
    return tl.load(record + FIELD).to(tl.int32)


@triton.jit
def address(record, FIELD: tl.constexpr, KIND: tl.constexpr):
    """A pointer to one element."""
    return tl.load(record + FIELD).to(tl.pointer_type(KIND))


@triton.jit
def aligned(record, FIELD: tl.constexpr, KIND: tl.constexpr):
    """A pointer to a tensor."""
    return tl.multiple_of(tl.load(record + FIELD).to(tl.pointer_type(KIND)), 16)


@triton.jit
def scratch_of(record, scratch):
    return scratch + tl.load(record + SCRATCH) * 16


# Adafactor with a factored second moment


@triton.jit
def factored_record(table):
    return table + tl.program_id(1) * FACTORED_WIDTH


@triton.jit
def programs_of(record, GROUPS: tl.constexpr):
    return number(record, COLUMN_GROUPS) * number(record, GROUPS) * number(record, STACK)


@triton.jit
def part_of(record, GROUPS: tl.constexpr, UNIT: tl.constexpr, ONE_TILE: tl.constexpr):
    """The part of this program; the row groups are in the field `GROUPS`, their tiles in the next, unless they have one."""
    rows, columns = number(record, ROWS) * UNIT, number(record, COLUMNS) * UNIT
    column_groups, row_groups, program = number(record, COLUMN_GROUPS), number(record, GROUPS), tl.program_id(0)
    column_group, rest = program % column_groups, program // column_groups
    row_group, b = rest % row_groups, rest // row_groups
    stack, stack_stride = number(record, STACK), rows.to(tl.int64) * columns
    if ONE_TILE:  # no loop then, which takes 16 registers
        return Part(rows, columns, stack, stack_stride, columns, 1, 1, column_group, row_group, b, program)
    tiles = number(record, GROUPS + 1)
    return Part(rows, columns, stack, stack_stride, columns, 1, tiles, column_group, row_group, b, program)


@triton.jit
def sums_together(
    table, scratch,
    GRAD: tl.constexpr, UNIT: tl.constexpr, ONE_TILE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    record = factored_record(table)
    if tl.program_id(0) < programs_of(record, SUM_GROUPS):
        sum_rows_and_columns(
            part_of(record, SUM_GROUPS, UNIT, ONE_TILE), aligned(record, GRADIENT, GRAD), scratch_of(record, scratch),
            number(record, COLUMN_SUMS_AT) * 16, number(record, TOTALS_AT) * 16, TILE_ROWS, TILE_COLUMNS, INDEX,
        )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def factors_together(table, scratch, average_weight, eps, UNIT: tl.constexpr):
    record = factored_record(table)
    stack, row_blocks = number(record, STACK), number(record, ROW_BLOCKS)
    blocks = row_blocks + number(record, COLUMN_BLOCKS)
    program = tl.program_id(0)
    if program < blocks * stack:
        rows, columns = number(record, ROWS) * UNIT, number(record, COLUMNS) * UNIT
        move_factors(
            aligned(record, ROW, tl.float32), aligned(record, COLUMN, tl.float32), address(record, MASS, tl.float32),
            scratch_of(record, scratch), address(record, SUMS, tl.float32), rows, columns, rows.to(tl.float32),
            columns.to(tl.float32), programs_of(record, SUM_GROUPS), number(record, COLUMN_GROUPS),
            number(record, SUM_GROUPS), row_blocks, number(record, COLUMN_SUMS_AT) * 16, number(record, TOTALS_AT) * 16,
            number(record, ROW_MEANS_AT) * 16, average_weight, eps, program % blocks, program // blocks, stack,
        )  # fmt: skip


@triton.jit
def squares_together(
    table, scratch,
    GRAD: tl.constexpr, UNIT: tl.constexpr, ONE_TILE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    record = factored_record(table)
    if tl.program_id(0) < programs_of(record, APPLY_GROUPS):
        part = part_of(record, APPLY_GROUPS, UNIT, ONE_TILE)
        sum_squares_of_update(
            part, aligned(record, GRADIENT, GRAD), aligned(record, ROW, tl.float32), scratch_of(record, scratch),
            part.rows.to(tl.float32), number(record, ROW_BLOCKS), number(record, COLUMN_SUMS_AT) * 16,
            number(record, ROW_MEANS_AT) * 16, number(record, SQUARES_AT) * 16, TILE_ROWS, TILE_COLUMNS, INDEX,
        )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def factored_together(
    table, scratch, measure, average_weight, lr, shrink, clip_threshold,
    WEIGHT: tl.constexpr, LOW: tl.constexpr, SCALES: tl.constexpr, GRAD: tl.constexpr, UNIT: tl.constexpr,
    ONE_TILE: tl.constexpr, STOCHASTIC: tl.constexpr, RELATIVE: tl.constexpr, ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, INDEX: tl.constexpr,
    BITS: tl.constexpr, GRID_BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    record = factored_record(table)
    if tl.program_id(0) < programs_of(record, APPLY_GROUPS):
        part = part_of(record, APPLY_GROUPS, UNIT, ONE_TILE)
        at, count = scratch_of(record, scratch), (part.stack_stride * part.stack).to(tl.float32)
        step, write = step_of_update(
            address(record, KNOWN_SUM, tl.float32), at, address(record, SUMS, tl.float32), programs_of(record, APPLY_GROUPS),
            measure, number(record, SQUARES_AT) * 16, count, lr, clip_threshold, RELATIVE,
        )  # fmt: skip
        square_sum = move_tiles(
            part, aligned(record, VALUES, WEIGHT), aligned(record, LOW_BITS, LOW), aligned(record, SCALES_AT, SCALES),
            aligned(record, GRADIENT, GRAD), at, number(record, COLUMN_SUMS_AT) * 16, step, shrink, number(record, KEY_0),
            number(record, KEY_1), 0, write, STOCHASTIC, RELATIVE, False, ALIGNED, TILE_ROWS, TILE_COLUMNS, INDEX, BITS,
            GRID_BLOCK, LARGEST,
        )  # fmt: skip
        end_update(  # reads only now what it needs, because it would be kept in registers
            part, square_sum, write, address(record, MASS, tl.float32), at, address(record, SUMS, tl.float32),
            programs_of(record, APPLY_GROUPS), number(record, TOTALS_AT) * 16, number(record, WEIGHT_SQUARES_AT) * 16,
            average_weight, RELATIVE,
        )  # fmt: skip


# Lines of elements


@triton.jit
def line_record(table):
    return table + tl.program_id(1) * LINE_WIDTH


@triton.jit
def line_sums_together(
    table, scratch, GRAD: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr
):
    record = line_record(table)
    if tl.program_id(0) < number(record, PROGRAMS):
        grad_square_sums(
            aligned(record, GRADIENT, GRAD), scratch_of(record, scratch), number(record, COUNT) * UNIT, 16, 16, 16, 16, 16,
            number(record, BLOCKS), False, BLOCK, INDEX,
        )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def moments_together(
    table,
    scratch,
    average_weight,
    eps,
    GRAD: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    record = line_record(table)
    programs = number(record, PROGRAMS)
    if tl.program_id(0) < programs:
        update_full_moment(
            aligned(record, GRADIENT, GRAD), aligned(record, FIRST, tl.float32), address(record, SECOND, tl.float32),
            scratch_of(record, scratch), address(record, SUMS, tl.float32), number(record, COUNT) * UNIT, 16, 16, 16, 16, 16,
            number(record, BLOCKS), programs, 16 + number(record, SECTION) * 16, average_weight, eps, False, False, BLOCK,
            INDEX,
        )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def full_together(
    table, scratch, measure, average_weight, eps, lr, shrink, clip_threshold,
    WEIGHT: tl.constexpr, LOW: tl.constexpr, SCALES: tl.constexpr, GRAD: tl.constexpr, UNIT: tl.constexpr,
    ALONE: tl.constexpr, STOCHASTIC: tl.constexpr, RELATIVE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
    BITS: tl.constexpr, GRID_BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    record = line_record(table)
    programs = number(record, PROGRAMS)
    if tl.program_id(0) < programs:
        count, section = number(record, COUNT) * UNIT, number(record, SECTION) * 16
        apply_full(
            aligned(record, VALUES, WEIGHT), aligned(record, LOW_BITS, LOW), aligned(record, SCALES_AT, SCALES),
            aligned(record, GRADIENT, GRAD), aligned(record, FIRST, tl.float32), address(record, SECOND, tl.float32),
            address(record, KNOWN_SUM, tl.float32), scratch_of(record, scratch), address(record, SUMS, tl.float32), count, 16,
            16, 16, 16, 16, number(record, BLOCKS), programs, measure, 16 + section, 16 + 2 * section, count.to(tl.float32),
            average_weight, eps, lr, shrink, clip_threshold, number(record, KEY_0), number(record, KEY_1), 0, ALONE, False,
            STOCHASTIC, RELATIVE, True, False, BLOCK, INDEX, BITS, GRID_BLOCK, LARGEST,
        )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def adamw_together(
    table, scratch, first_weight, second_weight, lr, shrink, eps,
    WEIGHT: tl.constexpr, LOW: tl.constexpr, SCALES: tl.constexpr, GRAD: tl.constexpr, UNIT: tl.constexpr,
    FIRST_MOMENT: tl.constexpr, ALONE: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
    BITS: tl.constexpr, GRID_BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    record = line_record(table)
    programs = number(record, PROGRAMS)
    if tl.program_id(0) < programs:
        apply_adamw(
            aligned(record, VALUES, WEIGHT), aligned(record, LOW_BITS, LOW), aligned(record, SCALES_AT, SCALES),
            aligned(record, GRADIENT, GRAD), aligned(record, FIRST, tl.float32), aligned(record, SECOND, tl.float32),
            address(record, THIRD, tl.float32), address(record, FOURTH, tl.float32), scratch_of(record, scratch),
            address(record, SUMS, tl.float32), number(record, COUNT) * UNIT, 16, 16, 16, 16, 16, number(record, BLOCKS),
            programs, first_weight, second_weight, lr, shrink, eps, number(record, KEY_0), number(record, KEY_1), 0,
            FIRST_MOMENT, ALONE, False, STOCHASTIC, True, False, BLOCK, INDEX, BITS, GRID_BLOCK, LARGEST,
        )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def sgd_together(
    table, scratch, momentum_weight, lr, shrink,
    WEIGHT: tl.constexpr, LOW: tl.constexpr, SCALES: tl.constexpr, GRAD: tl.constexpr, UNIT: tl.constexpr,
    MOMENTUM: tl.constexpr, ALONE: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
    BITS: tl.constexpr, GRID_BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    record = line_record(table)
    programs = number(record, PROGRAMS)
    if tl.program_id(0) < programs:
        apply_sgd(
            aligned(record, VALUES, WEIGHT), aligned(record, LOW_BITS, LOW), aligned(record, SCALES_AT, SCALES),
            aligned(record, GRADIENT, GRAD), aligned(record, FIRST, tl.float32), address(record, SECOND, tl.float32),
            scratch_of(record, scratch), address(record, SUMS, tl.float32), number(record, COUNT) * UNIT, 16, 16, 16, 16, 16,
            number(record, BLOCKS), programs, momentum_weight, lr, shrink, number(record, KEY_0), number(record, KEY_1), 0,
            MOMENTUM, ALONE, False, STOCHASTIC, True, False, BLOCK, INDEX, BITS, GRID_BLOCK, LARGEST,
        )  # fmt: skip
