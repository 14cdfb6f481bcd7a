"""The updates in Triton for CUDA devices: the functions of `reference`, bit for bit except for the order of sums.

(Triton before 3.6 also rounds quotients and roots of subnormal numbers to zero.)

The host never waits for the device: finite check, step size and bias correction are numbers in its memory. The learning rate,
the weights of averages and the words of the key may be tensors of shape () there, all of them or none, for launches that a CUDA
graph replays.

A large factored parameter takes four launches and moves 10 bytes per bfloat16 element: the gradient is read three times, the
weight read and written once. A vector takes one launch. Partial sums need at most 1 MiB, or 1% of the tensor beyond its rows
and columns if that is more. A weight that is not contiguous falls back to the reference.

A weight on a grid takes the same launches, and moves 8 bytes per element on 8 bits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sbft.grid.codes import Quantized
from sbft.optim.kernels import cuda_elementwise
from sbft.optim.kernels.blocks import Key, Weight, matrices, opened, stored
from sbft.optim.kernels.cuda_plans import (
    NO_GRID,
    FactoredPlan,
    GridKind,
    LineLaunches,
    factored_launches,
    line_launches,
)
from sbft.optim.kernels.fallback import or_reference
from sbft.optim.sharding import Shard
from sbft.rounding import signed_32

_LARGEST_BLOCK = 128  # of a grid; tiles consist of whole blocks

# Where the reference takes over


def covers(weight: Weight, grad: Tensor, shard: Shard | None) -> bool:
    """Whether the programs can update a weight.

    The programs take noise for consecutive elements. Where a row is split over several ranks, every row of a rank begins at
    another index. The reference, in blocks of a million elements there, takes some 20 launches each, and the ranks share the
    work.
    """
    weight = stored(weight)
    if isinstance(weight, Quantized):
        if weight.block > _LARGEST_BLOCK or not weight.is_contiguous:
            return False
    elif not weight.is_contiguous():
        return False
    return weight.numel() > 0 and (shard is None or not shard.columns_split)


def _keep_pace(shard: Shard | None, grad_square_sum: Tensor, counts: list[int]) -> None:
    """Join the sums that other ranks still take after a gradient that is not finite.

    Their programs do not wait to learn that it is not, while the reference of a rank without elements has returned.

    Args:
        counts: how many numbers each of these sums has.
    """
    if shard is not None and not torch.isfinite(grad_square_sum):
        for count in counts:
            shard.sum(torch.zeros(count, device=grad_square_sum.device))


def _keep_pace_with_factored(shard: Shard | None, sums: tuple[Tensor, Tensor | None]) -> None:
    _keep_pace(shard, sums[0], [1, 2] if shard is not None and shard.rows_split else [2])


def _keep_pace_with_full(shard: Shard | None, sums: tuple[Tensor, Tensor | None]) -> None:
    _keep_pace(shard, sums[0], [2])


# Adafactor


@or_reference(covers, after=_keep_pace_with_factored)
def adafactor_factored(
    weight: Weight,
    grad: Tensor,
    row: Tensor,
    column: Tensor,
    mass: Tensor,
    weight_square_sum: Tensor | None,
    *,
    average_weight: float | Tensor,
    lr: float | Tensor,
    relative_step: bool,
    clip_threshold: float,
    eps: float,
    weight_decay: float,
    key: Key,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `reference.adafactor_factored`; what it returns stays on the device."""
    g, memory = matrices(grad), opened(weight)
    shrink = shrink_of(memory, lr * weight_decay)
    launches = factored_launches(
        g.shape, g.stride(), dtype_of(memory), g.dtype, grad.is_contiguous(), weight.device,
        None if shard is None else (shard.offset, float(shard.count), float(shard.shape[0]) if shard.rows_split else None),
        key is not None, relative_step, isinstance(shrink, Tensor), grid_of(memory),
    )  # fmt: skip
    plan = launches.plan
    with current(weight.device):
        scratch = torch.empty(plan.scratch, dtype=torch.float32, device=weight.device)
        scalars = torch.empty(2, dtype=torch.float32, device=weight.device)
        launches.sums((g, scratch), launches.sums_numbers)
        if shard is not None:
            _sum_sums_over_ranks(shard, plan, scratch, *g.shape)
        launches.factors((row, column, mass, scratch, scalars), (*launches.factors_numbers, average_weight, float(eps)))
        if shard is not None and shard.rows_split:
            _sum_over_ranks(shard, scratch[plan.row_means_at :][: plan.row_blocks].view(-1, 1))
        launches.squares((g, row, scratch), launches.squares_numbers)

        def apply(square_sum: Tensor, results: Tensor, measure: bool) -> None:
            numbers = launches.measure_numbers if measure else launches.apply_numbers
            settings = average_weight, lr, shrink, float(clip_threshold), *words_of(key), _offset(shard)
            launches.apply((*tensors_of(memory), g, mass, square_sum, scratch, results), (*numbers, *settings))

        squares = None if shard is None else scratch[plan.squares_at :][: launches.applying]
        return _measure_and_apply(apply, scalars, weight_square_sum, relative_step, squares, shard)


@or_reference(covers, after=_keep_pace_with_full)
def adafactor_full(
    weight: Weight,
    grad: Tensor,
    second_moment: Tensor,
    mass: Tensor,
    weight_square_sum: Tensor | None,
    *,
    average_weight: float | Tensor,
    lr: float | Tensor,
    relative_step: bool,
    clip_threshold: float,
    eps: float,
    weight_decay: float,
    key: Key,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `reference.adafactor_full`; what it returns stays on the device."""
    g, memory = matrices(grad), opened(weight)
    shrink = shrink_of(memory, lr * weight_decay)
    line = _line(memory, grad, shard, cuda_elementwise.apply_full, shrink, key, RELATIVE=relative_step)
    squares_at, weight_squares_at = 16 + line.section, 16 + 2 * line.section
    with current(weight.device):
        scratch, scalars = line.allocate(3, weight.device)
        if not line.alone:
            _sum_squares(line, g, scratch, shard)
            numbers = (*line.numbers, line.programs, squares_at, average_weight, float(eps))
            line.moment((g, second_moment, mass, scratch, scalars), numbers)

        def apply(square_sum: Tensor, results: Tensor, measure: bool) -> None:
            settings = average_weight, float(eps), lr, shrink, float(clip_threshold), *words_of(key), _offset(shard)
            counts = line.programs, int(measure), squares_at, weight_squares_at, _count(weight, shard)
            tensors = *tensors_of(memory), g, second_moment, mass, square_sum, scratch, results
            line.apply(tensors, (*line.numbers, *counts, *settings))

        squares = None if shard is None else scratch[squares_at:][: line.programs]
        return _measure_and_apply(apply, scalars, weight_square_sum, relative_step, squares, shard)


def _measure_and_apply(
    apply: Any,
    scalars: Tensor,
    weight_square_sum: Tensor | None,
    relative_step: bool,
    squares: Tensor | None,
    shard: Shard | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the last launch, after a launch that measures the weight's sum of squares if that is needed and unknown.

    The same program measures it, in the same order, so that a resumed run has the bits that were carried before.

    Args:
        apply: the launch; called with the weight's sum of squares, where results go, and whether to measure only.
        scalars: results of the update.
        weight_square_sum: of the last update, if known.
        relative_step: whether the step is scaled by the weight's RMS.
        squares: of a shard, partial sums of the squared update.
        shard: the shard, or None.
    """
    if relative_step and weight_square_sum is None:
        measured = torch.empty_like(scalars)
        apply(measured, measured, True)
        weight_square_sum = measured[1]
    total = weight_square_sum if relative_step else scalars
    if shard is not None:
        assert squares is not None
        known = torch.zeros_like(squares[0]) if weight_square_sum is None else weight_square_sum
        update, total = shard.sum(squares.sum(), known)
        squares.zero_()
        squares[0] = update
    apply(total, scalars, False)
    grad_square_sum, new_square_sum = scalars.unbind()
    return grad_square_sum, new_square_sum if relative_step else weight_square_sum


def _sum_sums_over_ranks(
    shard: Shard, plan: FactoredPlan, scratch: Tensor, stack: int, rows: int, columns: int
) -> None:
    """Add other ranks' sums of the squared gradient: in all, and by column where the rows are split over ranks."""
    totals = scratch[plan.totals_at :][: plan.column_groups * plan.row_groups * stack].view(-1, 1)
    by_column = scratch[plan.column_sums_at :][: plan.row_groups * stack * columns].view(plan.row_groups, -1)
    _sum_over_ranks(shard, *([by_column] if shard.rows_split else []), totals)


def _sum_over_ranks(shard: Shard, *partial: Tensor) -> None:
    """Replace the first row of each matrix by the sum over its rows and all ranks, and the other rows by zeros."""
    for rows, total in zip(partial, shard.sum(*(rows.sum(0) for rows in partial)), strict=True):
        rows.zero_()
        rows[0] = total


def _sum_squares(line: LineLaunches, grad: Tensor, scratch: Tensor, shard: Shard | None) -> None:
    """Partial sums of the squared gradient."""
    line.sums((grad, scratch), line.numbers)
    if shard is not None:
        _sum_over_ranks(shard, scratch[16:][: line.programs].view(-1, 1))


def _count(weight: Weight, shard: Shard | None) -> float:
    return float(weight.numel() if shard is None else shard.count)


# AdamW and SGD


@or_reference(covers)
def adamw(
    weight: Weight,
    grad: Tensor,
    first_moment: Tensor | None,
    second_moment: Tensor,
    first_mass: Tensor,
    second_mass: Tensor,
    *,
    first_weight: float | Tensor,
    second_weight: float | Tensor,
    lr: float | Tensor,
    eps: float,
    weight_decay: float,
    key: Key,
    shard: Shard | None = None,
) -> Tensor:
    """As `reference.adamw`; what it returns stays on the device."""
    g, memory, has_first = matrices(grad), opened(weight), first_moment is not None
    shrink = shrink_of(memory, lr * weight_decay)
    line = _line(memory, grad, shard, cuda_elementwise.apply_adamw, shrink, key, FIRST_MOMENT=has_first)
    with current(weight.device):
        scratch, scalars = line.allocate(1, weight.device)
        if not line.alone:
            _sum_squares(line, g, scratch, shard)
        moments = second_moment if first_moment is None else first_moment, second_moment
        settings = first_weight, second_weight, lr, shrink, float(eps), *words_of(key), _offset(shard)
        line.apply(
            (*tensors_of(memory), g, *moments, first_mass, second_mass, scratch, scalars),
            (*line.numbers, line.programs, *settings),
        )
    return scalars[0]


@or_reference(covers)
def sgd(
    weight: Weight,
    grad: Tensor,
    momentum: Tensor | None,
    mass: Tensor | None,
    *,
    momentum_weight: float | Tensor,
    lr: float | Tensor,
    weight_decay: float,
    key: Key,
    shard: Shard | None = None,
) -> Tensor:
    """As `reference.sgd`; what it returns stays on the device."""
    g, memory = matrices(grad), opened(weight)
    shrink = shrink_of(memory, lr * weight_decay)
    line = _line(memory, grad, shard, cuda_elementwise.apply_sgd, shrink, key, MOMENTUM=momentum is not None)
    with current(weight.device):
        scratch, scalars = line.allocate(1, weight.device)
        if not line.alone:
            _sum_squares(line, g, scratch, shard)
        average = scalars if momentum is None else momentum, scalars if mass is None else mass
        settings = 1.0 if momentum is None else momentum_weight, lr, shrink, *words_of(key), _offset(shard)
        line.apply((*tensors_of(memory), g, *average, scratch, scalars), (*line.numbers, line.programs, *settings))
    return scalars[0]


def _line(
    weight: Weight, grad: Tensor, shard: Shard | None, program: Any, shrink: float | Tensor, key: Key, **kinds: bool
) -> LineLaunches:
    g = matrices(grad)
    return line_launches(
        g.shape, None if grad.is_contiguous() else g.stride(), dtype_of(weight), grad.dtype, weight.device,
        None if shard is None else shard.offset, program, grid_of(weight), ("STOCHASTIC", key is not None),
        ("CAPTURED", isinstance(shrink, Tensor)), *kinds.items(),
    )  # fmt: skip


def tensors_of(weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """What the programs take for a weight: values, or codes, their lower bits and scales; what a kind lacks is any tensor."""
    if isinstance(weight, Quantized):
        return weight.codes, weight.codes if weight.low is None else weight.low, weight.scales
    return weight, weight, weight


def dtype_of(weight: Weight) -> torch.dtype:
    return weight.codes.dtype if isinstance(weight, Quantized) else weight.dtype


def grid_of(weight: Weight) -> GridKind:
    return (weight.grid.bits, weight.block, weight.grid.largest) if isinstance(weight, Quantized) else NO_GRID


def shrink_of(weight: Weight, decay: float | Tensor) -> float | Tensor:
    """What the programs take for the weight's decay: the share that is left of values, or that codes lose."""
    return decay if isinstance(weight, Quantized) else 1.0 - decay


_NO_CHANGE: AbstractContextManager[Any] = nullcontext()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Launch on this device. If it is current already, nothing is entered, because that costs as much as a launch."""
    is_current = device.index is None or device.index == torch.cuda.current_device()
    return _NO_CHANGE if is_current else torch.cuda.device(device)


def _offset(shard: Shard | None) -> int:
    return 0 if shard is None else shard.offset


def words_of(key: Key) -> tuple[int | Tensor, int | Tensor]:
    if key is None:
        return 0, 0
    # Tensors hold them as int32 already.
    return key if isinstance(key[0], Tensor) else (signed_32(key[0]), signed_32(key[1]))
