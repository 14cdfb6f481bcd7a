"""The updates in Triton for CUDA devices: the functions of `reference`, bit for bit but for the order of sums (and, with Triton
before 3.6, for quotients and roots of subnormal numbers, which it takes for zero).

Nothing waits for the device: finite check, step size and bias correction are numbers in its memory. The learning rate and the
words of the key may be tensors of shape () there, for launches that a CUDA graph replays. A large factored
parameter takes four launches and 10 bytes per bfloat16 element (gradient read three times, weight read and written once), a
vector one. Partial sums need at most 1% of the tensor beyond its rows and columns, or 1 MiB. A weight that is not contiguous
goes to the reference.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbft.optim.kernels import cuda_elementwise, cuda_programs, reference
from sbft.optim.kernels.cuda_launch import Launch
from sbft.optim.kernels.reference import Key, matrices
from sbft.optim.sharding import Shard
from sbft.rounding import signed_32

TILE_COLUMNS, SUM_ROWS, APPLY_ROWS = 256, 32, 16
"""Tile of a matrix. One warp holds whole rows of it, so that row sums need no barrier. Applying needs more registers for an
element than summing: with half the rows, and its registers limited, three programs fit on a multiprocessor."""

APPLY_REGISTERS = 80  # holds the usual case, a contiguous bfloat16 gradient, without spilling

BLOCK, ALONE_BLOCKS = 2048, 8
"""Elements of a block of a line, and how many blocks one program updates alone."""

MAX_PROGRAMS = 1024
SMALL_BYTES, LARGE_SHARE = 1 << 20, 0.01
"""Partial sums take at most the larger of the two (the second as a share of the weight, beyond its rows and columns)."""

_SCALARS = 512  # bytes that an allocation of any size takes at least
_OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}


# Adafactor


def adafactor_factored(
    weight: Tensor,
    grad: Tensor,
    row: Tensor,
    column: Tensor,
    mass: Tensor,
    weight_square_sum: Tensor | None,
    *,
    average_weight: float,
    lr: float | Tensor,
    relative_step: bool,
    clip_threshold: float,
    eps: float,
    weight_decay: float,
    key: Key,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `reference.adafactor_factored`; what it returns stays on the device."""
    if not _covers(weight, shard):
        found = reference.adafactor_factored(
            weight, grad, row, column, mass, weight_square_sum, average_weight=average_weight, lr=lr,
            relative_step=relative_step, clip_threshold=clip_threshold, eps=eps, weight_decay=weight_decay, key=key,
            shard=shard,
        )  # fmt: skip
        _keep_pace(shard, found[0], [1, 2] if shard is not None and shard.rows_split else [2])
        return found
    g, shrink = matrices(grad), 1.0 - lr * weight_decay
    launches = factored_launches(
        g.shape, g.stride(), weight.dtype, g.dtype, grad.is_contiguous(), weight.device,
        None if shard is None else (shard.offset, float(shard.count), float(shard.shape[0]) if shard.rows_split else None),
        key is not None, relative_step, isinstance(shrink, Tensor),
    )  # fmt: skip
    plan = launches.plan
    with _current(weight.device):
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
            settings = average_weight, lr, shrink, float(clip_threshold), *_words(key), _offset(shard)
            launches.apply((weight, g, mass, square_sum, scratch, results), (*numbers, *settings))

        squares = None if shard is None else scratch[plan.squares_at :][: launches.applying]
        return _measure_and_apply(apply, scalars, weight_square_sum, relative_step, squares, shard)


class _FactoredLaunches:
    """What updates of weights of one shape have in common: their launches, and the numbers that these are always given."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        strides: tuple[int, ...],
        weight_dtype: torch.dtype,
        grad_dtype: torch.dtype,
        contiguous: bool,
        shard: tuple[int, float, float | None] | None,
        stochastic: bool,
        relative: bool,
        captured: bool,
    ) -> None:
        stack, rows, columns = shape
        self.plan = plan = factored_plan(*shape, weight_dtype.itemsize)
        offset, count, all_rows = (0, float(stack * rows * columns), None) if shard is None else shard
        all_rows = float(rows) if all_rows is None else all_rows
        index = _index(shape, strides, offset)
        summing = (plan.column_groups, plan.row_groups, stack)
        applying = (plan.column_groups, plan.apply_groups, stack)
        self.applying = math.prod(applying)
        tile = {"TILE_COLUMNS": TILE_COLUMNS, "INDEX": index}
        usual = contiguous and grad_dtype == weight_dtype == torch.bfloat16 and columns % 32 == 0 and shard is None
        kinds = {
            "STOCHASTIC": stochastic, "RELATIVE": relative, "SHARDED": shard is not None, "CAPTURED": captured,
            "ALIGNED": columns % 32 == offset % 32 == 0,
        }  # fmt: skip
        self.sums = Launch(cuda_programs.row_and_column_sums, summing, {"TILE_ROWS": SUM_ROWS, **tile}, _OPTIONS)
        self.factors = Launch(
            cuda_programs.update_factors,
            (plan.row_blocks + plan.column_blocks, stack, 1),
            {},
            {**_OPTIONS, "num_warps": 4},
        )
        self.squares = Launch(cuda_programs.update_square_sums, applying, {"TILE_ROWS": APPLY_ROWS, **tile}, _OPTIONS)
        self.apply = Launch(
            cuda_programs.apply_factored,
            applying,
            {**kinds, "TILE_ROWS": APPLY_ROWS, **tile},
            {**_OPTIONS, "maxnreg": APPLY_REGISTERS if usual else None},
        )
        self.sums_numbers = (rows, columns, *strides, plan.tiles, plan.column_sums_at, plan.totals_at)
        self.factors_numbers = (
            rows, columns, all_rows, float(columns), math.prod(summing), plan.column_groups, plan.row_groups,
            plan.row_blocks, plan.column_sums_at, plan.totals_at, plan.row_means_at,
        )  # fmt: skip
        self.squares_numbers = (
            rows, columns, all_rows, *strides, plan.apply_tiles, plan.row_blocks, plan.column_sums_at, plan.row_means_at,
            plan.squares_at,
        )  # fmt: skip
        self.apply_numbers, self.measure_numbers = (
            (
                rows, columns, *strides, plan.apply_tiles, self.applying, measure, plan.column_sums_at, plan.totals_at,
                plan.squares_at, plan.weight_squares_at, count,
            )
            for measure in (0, 1)
        )  # fmt: skip


@lru_cache(maxsize=4096)
def factored_launches(
    shape: tuple[int, int, int],
    strides: tuple[int, ...],
    weight_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    contiguous: bool,
    device: torch.device,
    shard: tuple[int, float, float | None] | None,
    stochastic: bool,
    relative: bool,
    captured: bool,
) -> _FactoredLaunches:
    """The launches of a kind of weight on a device, to which compiled programs belong; of a shard, its offset, the elements of
    the whole weight, and its rows where ranks share them."""
    return _FactoredLaunches(
        shape, strides, weight_dtype, grad_dtype, contiguous, shard, stochastic, relative, captured
    )


def adafactor_full(
    weight: Tensor,
    grad: Tensor,
    second_moment: Tensor,
    mass: Tensor,
    weight_square_sum: Tensor | None,
    *,
    average_weight: float,
    lr: float | Tensor,
    relative_step: bool,
    clip_threshold: float,
    eps: float,
    weight_decay: float,
    key: Key,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `reference.adafactor_full`; what it returns stays on the device."""
    if not _covers(weight, shard):
        found = reference.adafactor_full(
            weight, grad, second_moment, mass, weight_square_sum, average_weight=average_weight, lr=lr,
            relative_step=relative_step, clip_threshold=clip_threshold, eps=eps, weight_decay=weight_decay, key=key,
            shard=shard,
        )  # fmt: skip
        _keep_pace(shard, found[0], [2])
        return found
    g, shrink = matrices(grad), 1.0 - lr * weight_decay
    line = _line(weight, grad, shard, cuda_elementwise.apply_full, shrink, key, RELATIVE=relative_step)
    squares_at, weight_squares_at = 16 + line.section, 16 + 2 * line.section
    with _current(weight.device):
        scratch, scalars = line.allocate(3, weight.device)
        if not line.alone:
            line.sum_squares(g, scratch, shard)
            numbers = (*line.numbers, line.programs, squares_at, average_weight, float(eps))
            line.moment((g, second_moment, mass, scratch, scalars), numbers)

        def apply(square_sum: Tensor, results: Tensor, measure: bool) -> None:
            settings = average_weight, float(eps), lr, shrink, float(clip_threshold), *_words(key), _offset(shard)
            counts = line.programs, int(measure), squares_at, weight_squares_at, _count(weight, shard)
            tensors = weight, g, second_moment, mass, square_sum, scratch, results
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
    """Run the last launch; before it, if the weight's sum of squares is needed and unknown, the same launch to measure it.

    The same program adds in the same order, so a resumed run continues with the bits that were carried before. `squares` are
    the partial sums of the squared update of a shard.
    """
    if relative_step and weight_square_sum is None:
        measured = torch.empty_like(scalars)
        apply(measured, measured, True)
        weight_square_sum = measured[1]
    of_all = weight_square_sum if relative_step else scalars
    if shard is not None:
        assert squares is not None
        known = torch.zeros_like(squares[0]) if weight_square_sum is None else weight_square_sum
        update, of_all = shard.sum(squares.sum(), known)
        squares.zero_()
        squares[0] = update
    apply(of_all, scalars, False)
    grad_square_sum, new_square_sum = scalars.unbind()
    return grad_square_sum, new_square_sum if relative_step else weight_square_sum


def _sum_sums_over_ranks(
    shard: Shard, plan: FactoredPlan, scratch: Tensor, stack: int, rows: int, columns: int
) -> None:
    """Of the partial sums of a squared gradient: in all, and by column where ranks share the rows."""
    totals = scratch[plan.totals_at :][: plan.column_groups * plan.row_groups * stack].view(-1, 1)
    by_column = scratch[plan.column_sums_at :][: plan.row_groups * stack * columns].view(plan.row_groups, -1)
    _sum_over_ranks(shard, *([by_column] if shard.rows_split else []), totals)


def _sum_over_ranks(shard: Shard, *partial: Tensor) -> None:
    """Put the sum over its rows, and over all ranks, into the first row of each matrix, and zeros into the others."""
    for rows, total in zip(partial, shard.sum(*(rows.sum(0) for rows in partial)), strict=True):
        rows.zero_()
        rows[0] = total


def _keep_pace(shard: Shard | None, grad_square_sum: Tensor, counts: list[int]) -> None:
    """The programs of other ranks do not wait to learn that a gradient is not finite: they go on sending so many numbers,
    where the reference of a rank without elements has returned."""
    if shard is not None and not torch.isfinite(grad_square_sum):
        for count in counts:
            shard.sum(torch.zeros(count, device=grad_square_sum.device))


def _count(weight: Tensor, shard: Shard | None) -> float:
    return float(weight.numel() if shard is None else shard.count)


def _covers(weight: Tensor, shard: Shard | None) -> bool:
    """Whether the programs can update a weight; otherwise the reference does.

    The programs take noise for consecutive elements. Where a row lies on several ranks, every row of a rank begins elsewhere;
    the reference, in blocks of a million elements there, takes some 20 launches each, and the ranks share the work.
    """
    return weight.is_contiguous() and weight.numel() > 0 and (shard is None or not shard.columns_split)


# AdamW and SGD


def adamw(
    weight: Tensor,
    grad: Tensor,
    first_moment: Tensor | None,
    second_moment: Tensor,
    first_mass: Tensor,
    second_mass: Tensor,
    *,
    first_weight: float,
    second_weight: float,
    lr: float | Tensor,
    eps: float,
    weight_decay: float,
    key: Key,
    shard: Shard | None = None,
) -> Tensor:
    """As `reference.adamw`; what it returns stays on the device."""
    if not _covers(weight, shard):
        return reference.adamw(
            weight, grad, first_moment, second_moment, first_mass, second_mass, first_weight=first_weight,
            second_weight=second_weight, lr=lr, eps=eps, weight_decay=weight_decay, key=key, shard=shard,
        )  # fmt: skip
    g, shrink, has_first = matrices(grad), 1.0 - lr * weight_decay, first_moment is not None
    line = _line(weight, grad, shard, cuda_elementwise.apply_adamw, shrink, key, FIRST_MOMENT=has_first)
    with _current(weight.device):
        scratch, scalars = line.allocate(1, weight.device)
        if not line.alone:
            line.sum_squares(g, scratch, shard)
        moments = second_moment if first_moment is None else first_moment, second_moment
        settings = first_weight, second_weight, lr, shrink, float(eps), *_words(key), _offset(shard)
        line.apply(
            (weight, g, *moments, first_mass, second_mass, scratch, scalars), (*line.numbers, line.programs, *settings)
        )
    return scalars[0]


def sgd(
    weight: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    mass: Tensor | None,
    *,
    momentum_weight: float,
    lr: float | Tensor,
    weight_decay: float,
    key: Key,
    shard: Shard | None = None,
) -> Tensor:
    """As `reference.sgd`; what it returns stays on the device."""
    if not _covers(weight, shard):
        return reference.sgd(
            weight, grad, momentum, mass, momentum_weight=momentum_weight, lr=lr, weight_decay=weight_decay, key=key,
            shard=shard,
        )  # fmt: skip
    g, shrink = matrices(grad), 1.0 - lr * weight_decay
    line = _line(weight, grad, shard, cuda_elementwise.apply_sgd, shrink, key, MOMENTUM=momentum is not None)
    with _current(weight.device):
        scratch, scalars = line.allocate(1, weight.device)
        if not line.alone:
            line.sum_squares(g, scratch, shard)
        average = scalars if momentum is None else momentum, scalars if mass is None else mass
        settings = momentum_weight, lr, shrink, *_words(key), _offset(shard)
        line.apply((weight, g, *average, scratch, scalars), (*line.numbers, line.programs, *settings))
    return scalars[0]


# Sizes


class FactoredPlan(NamedTuple):
    """How a (B, R, C) tensor is cut, and where its partial sums lie in the scratch memory (all counted in float32)."""

    column_groups: int
    row_groups: int  # of the launch that writes column sums: the fewer, the less memory
    tiles: int  # of a row group
    apply_groups: int  # row groups of the other launches
    apply_tiles: int
    row_blocks: int
    column_blocks: int
    column_sums_at: int
    totals_at: int
    squares_at: int
    weight_squares_at: int
    row_means_at: int
    scratch: int


@lru_cache(maxsize=4096)
def factored_plan(stack: int, rows: int, columns: int, element_size: int) -> FactoredPlan:
    """Cut a (stack, rows, columns) weight into as many groups as programs are wanted and memory allows."""
    column_groups = triton.cdiv(columns, TILE_COLUMNS)
    most = max(1, MAX_PROGRAMS // (stack * column_groups))
    block = cuda_programs.FACTOR_BLOCK.value
    row_blocks, column_blocks = triton.cdiv(rows, block), triton.cdiv(columns, block)
    row_sums = _padded(stack * column_groups * rows)
    others = 64 + _padded(stack * row_blocks) + 3 * _padded(max(stack * column_groups, MAX_PROGRAMS))
    large = LARGE_SHARE * stack * rows * columns * element_size + 4 * stack * (rows + columns)
    memory = (max(SMALL_BYTES, int(large)) - _SCALARS) // 4 - row_sums - others
    tiles, row_groups = _cut(triton.cdiv(rows, SUM_ROWS), min(most, max(1, memory // (stack * columns))))
    apply_tiles, apply_groups = _cut(triton.cdiv(rows, APPLY_ROWS), most)
    totals_at = row_sums + _padded(stack * row_groups * columns) + 16  # the number before it counts arrivals
    squares_at = totals_at + _padded(stack * column_groups * row_groups)
    weight_squares_at = squares_at + _padded(stack * column_groups * apply_groups)
    row_means_at = weight_squares_at + _padded(stack * column_groups * apply_groups)
    return FactoredPlan(
        column_groups, row_groups, tiles, apply_groups, apply_tiles, row_blocks, column_blocks, row_sums,
        totals_at, squares_at, weight_squares_at, row_means_at, row_means_at + _padded(stack * row_blocks),
    )  # fmt: skip


def _cut(tiles: int, most_groups: int) -> tuple[int, int]:
    """Size and number of equal groups of tiles, at most `most_groups`."""
    size = triton.cdiv(tiles, min(tiles, most_groups))
    return size, triton.cdiv(tiles, size)


class LineLaunches:
    """What updates of weights of one size, each a line of elements, have in common: launches, and numbers always given.

    Args:
        shape: of the gradient, a stack of matrices.
        strides: of a gradient that is not contiguous.
        offset: global index of the first element; None but of a shard.
        program: the one that applies the update.
        kinds: compile-time arguments of its own.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        strides: tuple[int, ...] | None,
        offset: int | None,
        program: Any,
        kinds: dict[str, bool],
    ) -> None:
        # A contiguous gradient needs no shape: equal arguments spare a compilation per shape.
        size, sizes = math.prod(shape), (16, 16, 16, 16, 16) if strides is None else (*shape[1:], *strides)
        blocks = triton.cdiv(size, BLOCK)
        self.alone = blocks <= ALONE_BLOCKS and offset is None
        self.blocks = blocks if self.alone else triton.cdiv(blocks, MAX_PROGRAMS)
        self.programs = triton.cdiv(blocks, self.blocks)
        self.section = _padded(self.programs)
        self.numbers = (size, *sizes, self.blocks)
        index = _index(shape, (1, 1, 1) if strides is None else strides, offset or 0)
        line = {"STRIDED": strides is not None, "BLOCK": BLOCK, "INDEX": index}
        grid = (self.programs, 1, 1)
        self._sums = Launch(cuda_elementwise.grad_square_sums, grid, line, _OPTIONS)
        self.moment = Launch(cuda_elementwise.update_full_moment, grid, line, _OPTIONS)
        kinds = {**kinds, "ALONE": self.alone, "ALIGNED": (offset or 0) % 32 == 0}
        self.apply = Launch(program, grid, {**kinds, **line}, _OPTIONS)

    def allocate(self, sections: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Memory for the count of arrivals and `sections` partial sums per program, and for two results."""
        scalars = torch.empty(2, dtype=torch.float32, device=device)
        if self.alone:
            return scalars, scalars
        return torch.empty(16 + sections * self.section, dtype=torch.float32, device=device), scalars

    def sum_squares(self, grad: Tensor, scratch: Tensor, shard: Shard | None) -> None:
        """Launch the sums of the squared gradient."""
        self._sums((grad, scratch), self.numbers)
        if shard is not None:
            _sum_over_ranks(shard, scratch[16:][: self.programs].view(-1, 1))


@lru_cache(maxsize=4096)
def line_launches(
    shape: tuple[int, int, int],
    strides: tuple[int, ...] | None,
    weight_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    device: torch.device,
    offset: int | None,
    program: Any,
    *kinds: tuple[str, bool],
) -> LineLaunches:
    """The launches of a kind of weight on a device, to which compiled programs belong."""
    return LineLaunches(shape, strides, offset, program, dict(kinds))


def _line(
    weight: Tensor, grad: Tensor, shard: Shard | None, program: Any, shrink: float | Tensor, key: Key, **kinds: bool
) -> LineLaunches:
    g = matrices(grad)
    return line_launches(
        g.shape, None if grad.is_contiguous() else g.stride(), weight.dtype, grad.dtype, weight.device,
        None if shard is None else shard.offset, program, ("STOCHASTIC", key is not None),
        ("CAPTURED", isinstance(shrink, Tensor)), *kinds.items(),
    )  # fmt: skip


_HERE: AbstractContextManager[Any] = nullcontext()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Launch on this device; to enter the current one once more costs as much as a launch."""
    here = device.index is None or device.index == torch.cuda.current_device()
    return _HERE if here else torch.cuda.device(device)


def _offset(shard: Shard | None) -> int:
    return 0 if shard is None else shard.offset


def _index(shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Any:
    """Type that holds every offset into a weight and its gradient, with room for the masked end of the last group."""
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return tl.int32 if max(reach, offset + math.prod(shape)) < 1 << 30 else tl.int64


def _padded(count: int) -> int:
    return (count + 15) // 16 * 16


def _words(key: Key) -> tuple[int | Tensor, int | Tensor]:
    if key is None:
        return 0, 0
    # On the device they lie as int32.
    return key if isinstance(key[0], Tensor) else (signed_32(key[0]), signed_32(key[1]))
