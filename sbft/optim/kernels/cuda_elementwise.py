"""The Triton programs of updates whose state has one number per element: Adafactor on vectors, AdamW and SGD.

Here a tensor is a line of elements, divided into blocks; a program updates `blocks` consecutive ones. A single program updates
a short line (`ALONE`), in one launch. `offset` is the global index of the first element. `CAPTURED` is that of
`apply_factored`.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sbft.optim.kernels.cuda_programs import (
    COUNTS,
    average,
    is_last,
    move,
    numbers_of_step,
    step_size,
    sum_partials,
    weight_of_step,
)


class Gradient(NamedTuple):
    """A gradient as a line of elements, with the strides to read it where it is not contiguous.

    Programs make it from their arguments and are not launched with it: Triton specializes every member of a tuple argument,
    whatever `do_not_specialize` says.
    """

    pointer: Any
    count: Any  # number of elements
    rows: Any  # of a matrix
    columns: Any
    stack_stride: Any
    row_stride: Any
    column_stride: Any


@triton.jit
def load_gradient(grad, start, lane, STRIDED: tl.constexpr):
    """Float32 values of the elements `start + lane` of a `Gradient`; zero from its end on."""
    mask = start + lane < grad.count
    if STRIDED:
        row = (start + lane) // grad.columns
        c = start + lane - row * grad.columns
        b = row // grad.rows
        r = row - b * grad.rows
        pointers = grad.pointer + (b * grad.stack_stride + r * grad.row_stride + c * grad.column_stride)
        return tl.load(pointers, mask, 0.0).to(tl.float32)
    else:
        return tl.load(grad.pointer + start + lane, mask, 0.0).to(tl.float32)


@triton.jit
def square_sum_of_blocks(grad, first, blocks, STRIDED: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(0, blocks):
        start = (first + block) * BLOCK
        g = load_gradient(grad, start, lane, STRIDED)
        total += g * g
    return tl.sum(total)


@triton.jit(do_not_specialize=COUNTS)
def grad_square_sums(
    grad,
    scratch,
    count,
    rows,
    columns,
    stack_stride,
    row_stride,
    column_stride,
    blocks,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Each program's sum of the squared gradient, from `scratch[16]` on; resets the arrivals, `scratch[0]`."""
    program = tl.program_id(0)
    first = program.to(INDEX) * blocks
    grad = Gradient(grad, count, rows, columns, stack_stride, row_stride, column_stride)
    total = square_sum_of_blocks(grad, first, blocks, STRIDED, BLOCK)
    tl.store(scratch + 16 + program, total)
    if program == 0:
        tl.store(scratch, 0.0)


@triton.jit
def total_square_sum(
    grad, scratch, scalars, partials, blocks,
    ALONE: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Sum of the squared gradient, in every program; also stored in `scalars[0]`."""
    if ALONE:
        first = tl.program_id(0).to(INDEX)
        total = square_sum_of_blocks(grad, first, blocks, STRIDED, BLOCK)
    else:
        total = sum_partials(scratch + 16, partials)
    if tl.program_id(0) == 0:
        tl.store(scalars, total)
    return total


# Adafactor


@triton.jit
def full_moment_of_blocks(
    grad, second_moment, mass, first, blocks, write, average_weight, eps, STRIDED: tl.constexpr, BLOCK: tl.constexpr
):
    """Update the second moment with the gradient; returns the sum of the squared unscaled update."""
    lane = tl.arange(0, BLOCK)
    new_mass = average(tl.load(mass), 1.0, average_weight)
    square_sum = tl.zeros([BLOCK], tl.float32)
    for block in range(0, blocks):
        start = (first + block) * BLOCK
        mask = start + lane < grad.count
        g = load_gradient(grad, start, lane, STRIDED)
        moment = average(tl.load(second_moment + start + lane, mask, 1.0), g * g + eps, average_weight)
        tl.store(second_moment + start + lane, moment, mask & write)
        update = tl.div_rn(g, tl.sqrt_rn(tl.div_rn(moment, new_mass)))
        square_sum += tl.where(mask, update * update, 0.0)
    return tl.sum(square_sum)


@triton.jit(do_not_specialize=COUNTS)
def update_full_moment(
    grad,
    second_moment,
    mass,
    scratch,
    scalars,
    count,
    rows,
    columns,
    stack_stride,
    row_stride,
    column_stride,
    blocks,
    partials,
    squares_at,
    average_weight,
    eps,
    CAPTURED: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Update the second moment, and store each program's sum of the squared unscaled update."""
    grad = Gradient(grad, count, rows, columns, stack_stride, row_stride, column_stride)
    average_weight = weight_of_step(average_weight, CAPTURED)
    total = total_square_sum(grad, scratch, scalars, partials, blocks, False, STRIDED, BLOCK, INDEX)
    program = tl.program_id(0)
    first, write = program.to(INDEX) * blocks, total < float("inf")
    square_sum = full_moment_of_blocks(
        grad, second_moment, mass, first, blocks, write, average_weight, eps, STRIDED, BLOCK
    )
    tl.store(scratch + squares_at + program, square_sum)


@triton.jit(do_not_specialize=COUNTS)
def apply_full(
    weight,
    low,
    scales,
    grad,
    second_moment,
    mass,
    weight_square_sum,
    scratch,
    scalars,
    count,
    rows,
    columns,
    stack_stride,
    row_stride,
    column_stride,
    blocks,
    partials,
    measure,
    squares_at,
    weight_squares_at,
    element_count,
    average_weight,
    eps,
    lr,
    shrink,
    clip_threshold,
    key_0,
    key_1,
    offset,
    ALONE: tl.constexpr,
    CAPTURED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    RELATIVE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    GRID_BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Store the new weights and, with `RELATIVE`, the sum of their squares; with `measure` only that of the old weights."""
    grad = Gradient(grad, count, rows, columns, stack_stride, row_stride, column_stride)
    lr, shrink, key_0, key_1 = numbers_of_step(lr, shrink, key_0, key_1, CAPTURED, STOCHASTIC)
    average_weight = weight_of_step(average_weight, CAPTURED)
    program = tl.program_id(0)
    first = program.to(INDEX) * blocks
    if ALONE:
        total = total_square_sum(grad, scratch, scalars, partials, blocks, True, STRIDED, BLOCK, INDEX)
        write = (total < float("inf")) & (measure == 0)
        update_square_sum = full_moment_of_blocks(
            grad, second_moment, mass, first, blocks, write, average_weight, eps, STRIDED, BLOCK
        )
        tl.debug_barrier()  # the second moment is read again below
    else:
        write = (tl.load(scalars) < float("inf")) & (measure == 0)
        update_square_sum = sum_partials(scratch + squares_at, partials)
    step = step_size(update_square_sum, tl.load(weight_square_sum), element_count, lr, clip_threshold, RELATIVE)
    new_mass = average(tl.load(mass), 1.0, average_weight)
    lane = tl.arange(0, BLOCK)
    square_sum = tl.zeros([BLOCK], tl.float32)
    for block in range(0, blocks):
        start = (first + block) * BLOCK
        mask = start + lane < count
        g = load_gradient(grad, start, lane, STRIDED)
        moment = tl.load(second_moment + start + lane, mask, 1.0)
        update = tl.div_rn(g, tl.sqrt_rn(tl.div_rn(moment, new_mass)))
        stored = move(
            weight, low, scales, (start + lane)[None, :], update[None, :], step, shrink, start + offset, lane[None, :], key_0,
            key_1, mask[None, :], write, STOCHASTIC, ALIGNED, BITS, GRID_BLOCK, LARGEST,
        )  # fmt: skip
        if RELATIVE:
            square_sum += tl.reshape(stored * stored, [BLOCK])
    if ALONE:
        last = program == 0
        tl.store(scalars + 1, tl.sum(square_sum))
    else:
        tl.store(scratch + weight_squares_at + program, tl.sum(square_sum))
        last = is_last(scratch, partials)
        if last:
            tl.store(scalars + 1, sum_partials(scratch + weight_squares_at, partials))
            tl.store(scratch, 0.0)
    if last & write:
        tl.store(mass, new_mass)


# AdamW and SGD


@triton.jit(do_not_specialize=COUNTS)
def apply_adamw(
    weight,
    low,
    scales,
    grad,
    first_moment,
    second_moment,
    first_mass,
    second_mass,
    scratch,
    scalars,
    count,
    rows,
    columns,
    stack_stride,
    row_stride,
    column_stride,
    blocks,
    partials,
    first_weight,
    second_weight,
    lr,
    shrink,
    eps,
    key_0,
    key_1,
    offset,
    FIRST_MOMENT: tl.constexpr,
    ALONE: tl.constexpr,
    CAPTURED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    GRID_BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Update the moments and weights of AdamW."""
    grad = Gradient(grad, count, rows, columns, stack_stride, row_stride, column_stride)
    lr, shrink, key_0, key_1 = numbers_of_step(lr, shrink, key_0, key_1, CAPTURED, STOCHASTIC)
    first_weight, second_weight = weight_of_step(first_weight, CAPTURED), weight_of_step(second_weight, CAPTURED)
    total = total_square_sum(grad, scratch, scalars, partials, blocks, ALONE, STRIDED, BLOCK, INDEX)
    write = total < float("inf")
    new_first_mass = average(tl.load(first_mass), 1.0, first_weight)
    new_second_mass = average(tl.load(second_mass), 1.0, second_weight)
    lane = tl.arange(0, BLOCK)
    for block in range(0, blocks):
        start = (tl.program_id(0).to(INDEX) * blocks + block) * BLOCK
        mask = start + lane < count
        g = load_gradient(grad, start, lane, STRIDED)
        second = average(tl.load(second_moment + start + lane, mask, 0.0), g * g, second_weight)
        tl.store(second_moment + start + lane, second, mask & write)
        mean = g
        if FIRST_MOMENT:
            first = average(tl.load(first_moment + start + lane, mask, 0.0), g, first_weight)
            tl.store(first_moment + start + lane, first, mask & write)
            mean = tl.div_rn(first, new_first_mass)
        update = tl.div_rn(mean, tl.sqrt_rn(tl.div_rn(second, new_second_mass)) + eps)
        move(
            weight, low, scales, (start + lane)[None, :], update[None, :], lr, shrink, start + offset, lane[None, :], key_0,
            key_1, mask[None, :], write, STOCHASTIC, ALIGNED, BITS, GRID_BLOCK, LARGEST,
        )  # fmt: skip
    last = tl.program_id(0) == 0
    if not ALONE:
        last = is_last(scratch, partials)
    if last & write:  # every program has read the old masses
        tl.store(first_mass, new_first_mass)
        tl.store(second_mass, new_second_mass)


@triton.jit(do_not_specialize=COUNTS)
def apply_sgd(
    weight,
    low,
    scales,
    grad,
    momentum,
    mass,
    scratch,
    scalars,
    count,
    rows,
    columns,
    stack_stride,
    row_stride,
    column_stride,
    blocks,
    partials,
    momentum_weight,
    lr,
    shrink,
    key_0,
    key_1,
    offset,
    MOMENTUM: tl.constexpr,
    ALONE: tl.constexpr,
    CAPTURED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    GRID_BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Update the weights, and with `MOMENTUM` the gradient's average."""
    grad = Gradient(grad, count, rows, columns, stack_stride, row_stride, column_stride)
    lr, shrink, key_0, key_1 = numbers_of_step(lr, shrink, key_0, key_1, CAPTURED, STOCHASTIC)
    total = total_square_sum(grad, scratch, scalars, partials, blocks, ALONE, STRIDED, BLOCK, INDEX)
    write = total < float("inf")
    new_mass = 1.0
    if MOMENTUM:
        momentum_weight = weight_of_step(momentum_weight, CAPTURED)
        new_mass = average(tl.load(mass), 1.0, momentum_weight)
    lane = tl.arange(0, BLOCK)
    for block in range(0, blocks):
        start = (tl.program_id(0).to(INDEX) * blocks + block) * BLOCK
        mask = start + lane < count
        update = load_gradient(grad, start, lane, STRIDED)
        if MOMENTUM:
            mean = average(tl.load(momentum + start + lane, mask, 0.0), update, momentum_weight)
            tl.store(momentum + start + lane, mean, mask & write)
            update = tl.div_rn(mean, new_mass)
        move(
            weight, low, scales, (start + lane)[None, :], update[None, :], lr, shrink, start + offset, lane[None, :], key_0,
            key_1, mask[None, :], write, STOCHASTIC, ALIGNED, BITS, GRID_BLOCK, LARGEST,
        )  # fmt: skip
    if MOMENTUM:
        last = tl.program_id(0) == 0
        if not ALONE:
            last = is_last(scratch, partials)
        if last & write:
            tl.store(mass, new_mass)
