"""How a weight is divided among the instances of the Triton programs, and the launches that equal weights share."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbft.optim.kernels import cuda_elementwise, cuda_factored
from sbft.optim.kernels.cuda_launch import Launch

TILE_COLUMNS, SUM_ROWS, APPLY_ROWS = 256, 32, 16
"""Tile of a matrix. One warp holds whole rows of it, so that row sums need no barrier. Applying takes more registers per
element than summing: with half the rows and a limit on registers, three programs fit on a multiprocessor."""

APPLY_REGISTERS = 80  # enough for the usual case, a contiguous bfloat16 gradient, without spilling

BLOCK, ALONE_BLOCKS = 2048, 8
"""Elements of a block of a line, and how many blocks one program updates alone."""

MAX_PROGRAMS = 1024
SMALL_BYTES, LARGE_SHARE = 1 << 20, 0.01
"""Limits of the partial sums, of which the larger applies; the second is a share of the weight, beyond its rows and columns."""

_SCALARS = 512  # smallest size of an allocation, in bytes
OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}


# Matrices


class FactoredPlan(NamedTuple):
    """How a (B, R, C) tensor is divided, and where its partial sums are in the scratch memory (all counted in float32)."""

    column_groups: int
    row_groups: int  # in the launch that writes column sums: fewer take less memory
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
    """Divide a (stack, rows, columns) weight into as many groups as `MAX_PROGRAMS` and memory allow."""
    column_groups = triton.cdiv(columns, TILE_COLUMNS)
    most = max(1, MAX_PROGRAMS // (stack * column_groups))
    block = cuda_factored.FACTOR_BLOCK.value
    row_blocks, column_blocks = triton.cdiv(rows, block), triton.cdiv(columns, block)
    row_sums = _padded(stack * column_groups * rows)
    rest = 64 + _padded(stack * row_blocks) + 3 * _padded(max(stack * column_groups, MAX_PROGRAMS))
    large = LARGE_SHARE * stack * rows * columns * element_size + 4 * stack * (rows + columns)
    memory = (max(SMALL_BYTES, int(large)) - _SCALARS) // 4 - row_sums - rest
    tiles, row_groups = _cut(triton.cdiv(rows, SUM_ROWS), min(most, max(1, memory // (stack * columns))))
    apply_tiles, apply_groups = _cut(triton.cdiv(rows, APPLY_ROWS), most)
    totals_at = row_sums + _padded(stack * row_groups * columns) + 16  # the element before it counts arrivals
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


GridKind = tuple[int, int, int]
"""Bits, block and largest code of the grid that a weight is on; zeros for one of values."""

NO_GRID: GridKind = (0, 0, 0)


def grid_constants(grid: GridKind) -> dict[str, int]:
    return dict(zip(("BITS", "GRID_BLOCK", "LARGEST"), grid, strict=True))


class FactoredLaunches:
    """Launches that all updates of weights of one shape share, with the numbers that do not change between them."""

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
        grid: GridKind,
    ) -> None:
        stack, rows, columns = shape
        self.plan = plan = factored_plan(*shape, weight_dtype.itemsize)
        offset, count, all_rows = (0, float(stack * rows * columns), None) if shard is None else shard
        all_rows = float(rows) if all_rows is None else all_rows
        index = index_type(shape, strides, offset)
        summing = (plan.column_groups, plan.row_groups, stack)
        applying = (plan.column_groups, plan.apply_groups, stack)
        self.applying = math.prod(applying)
        tile = {"TILE_COLUMNS": TILE_COLUMNS, "INDEX": index}
        usual = contiguous and grad_dtype == weight_dtype == torch.bfloat16 and columns % 32 == 0 and shard is None
        kinds = {
            "STOCHASTIC": stochastic, "RELATIVE": relative, "SHARDED": shard is not None, "CAPTURED": captured,
            "ALIGNED": columns % 32 == offset % 32 == 0,
        }  # fmt: skip
        self.sums = Launch(cuda_factored.row_and_column_sums, summing, {"TILE_ROWS": SUM_ROWS, **tile}, OPTIONS)
        self.factors = Launch(
            cuda_factored.update_factors,
            (plan.row_blocks + plan.column_blocks, stack, 1),
            {"CAPTURED": captured},
            {**OPTIONS, "num_warps": 4},
        )
        self.squares = Launch(cuda_factored.update_square_sums, applying, {"TILE_ROWS": APPLY_ROWS, **tile}, OPTIONS)
        self.apply = Launch(
            cuda_factored.apply_factored,
            applying,
            {**kinds, "TILE_ROWS": APPLY_ROWS, **tile, **grid_constants(grid)},
            {**OPTIONS, "maxnreg": APPLY_REGISTERS if usual else None},
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
    grid: GridKind,
) -> FactoredLaunches:
    """The launches for one kind of weight on one device, because compiled programs belong to a device.

    `shard` is its offset, the number of elements of the whole weight, and the number of its rows if they are split over ranks.
    """
    return FactoredLaunches(
        shape, strides, weight_dtype, grad_dtype, contiguous, shard, stochastic, relative, captured, grid
    )


# Lines


class LinePlan(NamedTuple):
    """How a line of elements is divided."""

    alone: bool  # one program updates it in one launch
    blocks: int  # of a program
    programs: int
    section: int  # numbers of scratch memory for one partial sum per program


def line_plan(size: int, whole: bool) -> LinePlan:
    """Divide a weight of `size` elements, or the part of one that a shard holds."""
    blocks = triton.cdiv(size, BLOCK)
    alone = blocks <= ALONE_BLOCKS and whole
    of_program = blocks if alone else triton.cdiv(blocks, MAX_PROGRAMS)
    programs = triton.cdiv(blocks, of_program)
    return LinePlan(alone, of_program, programs, _padded(programs))


class LineLaunches:
    """Launches that all updates of weights of one size share, each a line of elements, with the numbers that do not change.

    Args:
        shape: shape of the gradient, a stack of matrices.
        strides: strides of the gradient; None if it is contiguous.
        offset: global index of a shard's first element; None if the weight is whole.
        program: applies the update.
        kinds: compile-time arguments of `program`.
        grid: the grid that the weight is on.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        strides: tuple[int, ...] | None,
        offset: int | None,
        program: Any,
        kinds: dict[str, bool],
        grid: GridKind = NO_GRID,
    ) -> None:
        # A contiguous gradient needs no shape: with equal arguments one compilation serves all shapes.
        size, sizes = math.prod(shape), (16, 16, 16, 16, 16) if strides is None else (*shape[1:], *strides)
        plan = line_plan(size, offset is None)
        self.alone, self.programs, self.section = plan.alone, plan.programs, plan.section
        self.numbers = (size, *sizes, plan.blocks)
        index = index_type(shape, (1, 1, 1) if strides is None else strides, offset or 0)
        line = {"STRIDED": strides is not None, "BLOCK": BLOCK, "INDEX": index}
        programs = (self.programs, 1, 1)
        self.sums = Launch(cuda_elementwise.grad_square_sums, programs, line, OPTIONS)
        self.moment = Launch(
            cuda_elementwise.update_full_moment, programs, {"CAPTURED": kinds["CAPTURED"], **line}, OPTIONS
        )
        kinds = {**kinds, "ALONE": self.alone, "ALIGNED": (offset or 0) % 32 == 0}
        self.apply = Launch(program, programs, {**kinds, **line, **grid_constants(grid)}, OPTIONS)

    def allocate(self, sections: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Memory for the arrivals and `sections` partial sums per program, and for two results."""
        scalars = torch.empty(2, dtype=torch.float32, device=device)
        if self.alone:
            return scalars, scalars
        return torch.empty(16 + sections * self.section, dtype=torch.float32, device=device), scalars


@lru_cache(maxsize=4096)
def line_launches(
    shape: tuple[int, int, int],
    strides: tuple[int, ...] | None,
    weight_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    device: torch.device,
    offset: int | None,
    program: Any,
    grid: GridKind,
    *kinds: tuple[str, bool],
) -> LineLaunches:
    """The launches for one kind of weight on one device, because compiled programs belong to a device."""
    return LineLaunches(shape, strides, offset, program, dict(kinds), grid)


# Both


def index_type(shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Any:
    """Integer type for every offset into a weight and its gradient, with room for the masked end of the last group."""
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return tl.int32 if max(reach, offset + math.prod(shape)) < 1 << 30 else tl.int64


def _padded(count: int) -> int:
    return (count + 15) // 16 * 16
