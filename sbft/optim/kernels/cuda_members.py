"""What of the weights that share launches stays the same from update to update: their records, and the launches."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from sbft.optim.kernels import cuda, cuda_plans, cuda_together
from sbft.optim.kernels.blocks import Weight
from sbft.optim.kernels.cuda_launch import Launch


class Form(NamedTuple):
    """What is compiled into the programs of a launch: only weights with the same can share it."""

    function: str
    weight_dtype: torch.dtype
    grad_dtype: torch.dtype
    grid: cuda_plans.GridKind
    unit: int  # that divides the sizes of the weight
    aligned: bool  # every row of a matrix begins at a multiple of 32 elements
    alone: bool  # one program updates a line of elements, or every program has one tile of a matrix
    stochastic: bool
    kind: bool  # relative step of Adafactor, first moment of AdamW, momentum of SGD


class Member:
    """What stays the same from update to update of one weight with one state.

    Attributes:
        form: of its launches.
        fixed: the part of its record that stays, as bytes.
        programs: number of programs in each of its launches.
        scratch: numbers of scratch memory.
        sums: where its programs store the sums of the squared gradient and of the squared new weight, float32.
        waits: whether an update of it waits.
    """

    def __init__(self, form: Form, weight: Weight, state: Sequence[Tensor], rows_and_columns: torch.Size) -> None:
        self.form, self.waits = form, False
        tensors = cuda.tensors_of(weight)
        self.sums = torch.empty(2, dtype=torch.float32, device=weight.device)
        self.results = self.sums.unbind()
        pointers = [tensor.data_ptr() for tensor in (*tensors, self.sums, *state)]
        if form.function == "adafactor_factored":
            stack, rows, columns = rows_and_columns
            plan = cuda_plans.factored_plan(stack, rows, columns, form.weight_dtype.itemsize)
            applying = plan.column_groups * plan.apply_groups * stack
            factors = (plan.row_blocks + plan.column_blocks) * stack
            self.programs: tuple[int, ...] = (plan.column_groups * plan.row_groups * stack, factors, applying)
            self.scratch = plan.scratch
            places = (plan.column_sums_at, plan.totals_at, plan.row_means_at, plan.squares_at, plan.weight_squares_at)
            numbers = [
                rows // form.unit, columns // form.unit, stack, plan.column_groups, plan.row_groups, plan.tiles,
                plan.apply_groups, plan.apply_tiles, plan.row_blocks, plan.column_blocks, *(place // 16 for place in places),
            ]  # fmt: skip
        else:
            line = cuda_plans.line_plan(weight.numel(), whole=True)
            self.programs = (line.programs,)
            self.scratch = 0 if line.alone else 16 + 3 * line.section
            pointers += [pointers[-1]] * (4 - len(state))
            numbers = [weight.numel() // form.unit, line.blocks, line.programs, line.section // 16]
        self.fixed = struct.pack(f"<{len(pointers) + len(numbers)}q", *pointers, *numbers)


class TogetherLaunches:
    """The launches for weights of one form, in grids of one size.

    Args:
        form: of the weights.
        programs: the most programs of a weight in each launch.
        count: number of weights.
    """

    def __init__(self, form: Form, programs: tuple[int, ...], count: int) -> None:
        self._form = form
        index = cuda_plans.index_type((1,), (1,), 0)
        unit = {"UNIT": form.unit}
        gradient = {"GRAD": _TRITON[form.grad_dtype], **unit}
        weights = {
            **gradient,
            **_weight_types(form),
            "STOCHASTIC": form.stochastic,
            **cuda_plans.grid_constants(form.grid),
        }
        grids = [(most, count, 1) for most in programs]
        options = cuda_plans.OPTIONS
        if form.function == "adafactor_factored":
            tile = {"ONE_TILE": form.alone, "TILE_COLUMNS": cuda_plans.TILE_COLUMNS, "INDEX": index}
            apply_tile = {"TILE_ROWS": cuda_plans.APPLY_ROWS, **tile}
            sums_tile = {"TILE_ROWS": cuda_plans.SUM_ROWS, **tile}
            self._before = [
                Launch(cuda_together.sums_together, grids[0], {**gradient, **sums_tile}, options),
                Launch(cuda_together.factors_together, grids[1], unit, {**options, "num_warps": 4}),
                Launch(cuda_together.squares_together, grids[2], {**gradient, **apply_tile}, options),
            ]
            kinds = {**weights, "RELATIVE": form.kind, "ALIGNED": form.aligned, **apply_tile}
            self._apply = Launch(cuda_together.factored_together, grids[2], kinds, options)
            return
        line = {"BLOCK": cuda_plans.BLOCK, "INDEX": index}
        program, kind = _LINES[form.function]
        self._before = (
            [] if form.alone else [Launch(cuda_together.line_sums_together, grids[0], {**gradient, **line}, options)]
        )
        if form.function == "adafactor_full" and not form.alone:
            self._before.append(Launch(cuda_together.moments_together, grids[0], {**gradient, **line}, options))
        kinds = {**weights, kind: form.kind, "ALONE": form.alone, **line}
        self._apply = Launch(program, grids[0], kinds, options)

    def __call__(self, tensors: tuple[Tensor, Tensor], numbers: tuple[float, ...], measure: bool) -> None:
        """Launch.

        Args:
            tensors: the table of records, and scratch memory.
            numbers: of the step.
            measure: whether the weights' sums of squares are measured first.
        """
        if self._form.function in ("adamw", "sgd"):
            for launch in self._before:
                launch(tensors, ())
            self._apply(tensors, numbers)
            return
        eps, average_weight, *of_step = numbers
        for i, launch in enumerate(self._before):
            launch(tensors, (average_weight, eps) if i == 1 else ())
        if measure:
            self._apply(tensors, (1, average_weight, *of_step))
        self._apply(tensors, (0, average_weight, *of_step))


@lru_cache(maxsize=4096)
def launches_of(form: Form, programs: tuple[int, ...], count: int, device: torch.device) -> TogetherLaunches:
    """On one device, because compiled programs belong to a device."""
    return TogetherLaunches(form, programs, count)


_TRITON: dict[torch.dtype, Any] = {
    torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.int8: tl.int8, torch.uint8: tl.uint8,
}  # fmt: skip
_LINES = {
    "adafactor_full": (cuda_together.full_together, "RELATIVE"),
    "adamw": (cuda_together.adamw_together, "FIRST_MOMENT"),
    "sgd": (cuda_together.sgd_together, "MOMENTUM"),
}


def _weight_types(form: Form) -> dict[str, Any]:
    weight = _TRITON[form.weight_dtype]
    if form.grid == cuda_plans.NO_GRID:
        return {"WEIGHT": weight, "LOW": weight, "SCALES": weight}
    low = tl.uint8 if form.grid[0] == 12 else weight
    return {"WEIGHT": weight, "LOW": low, "SCALES": tl.float16}
