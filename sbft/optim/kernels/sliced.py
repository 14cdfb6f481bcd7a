"""Updates of a matrix from a gradient in slices: the arithmetic of `reference`, with one pass over the slices per read.

On a CPU the phases of the compiled update run slice by slice, in the same parts as with a whole gradient. All sums are then
taken in the same order, and the result is the same bit for bit if the slices have the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sbft.grid.codes import Quantized
from sbft.optim.kernels import cpu, reference
from sbft.optim.kernels.blocks import Key, Weight, stored, weight_matrices
from sbft.optim.sharding import Shard
from sbft.optim.vocabulary import SlicedGradient

SLICE_ELEMENTS = 1 << 20
"""Elements of a slice where the compiled update does not determine their number."""

_MOST_PARTS_IN_SLICE = 8
"""Of a compiled update, which has 64 where it works on a large matrix."""

GPU_SLICE_ELEMENTS = 1 << 24
"""The same on a GPU: 32 MiB of bfloat16."""


def adafactor_factored(
    weight: Weight,
    grad: SlicedGradient,
    row: Tensor,
    column: Tensor,
    mass: Tensor,
    weight_square_sum: float | Tensor | None,
    *,
    kernels: ModuleType,
    key: Key,
    **settings: Any,
) -> tuple[float | Tensor, float | Tensor | None]:
    """As `reference.adafactor_factored`, in compiled code if `kernels` is `sbft.optim.kernels.cpu` and it covers the update.

    Where a row of the gradient is zero, only `weight_decay` moves the weight's row.
    """
    if kernels is cpu and cpu.covers(weight, grad, None):
        known = weight_square_sum if isinstance(weight_square_sum, float) else None
        return _compiled(weight, grad, (row, column, mass), known, key=key, **settings)
    return _adafactor(weight, grad, (row, column, mass), weight_square_sum, key=key, **settings)


def sgd(
    weight: Tensor, grad: SlicedGradient, *, kernels: ModuleType, lr: float | Tensor, weight_decay: float, key: Key
) -> Tensor:
    """As `reference.sgd` without momentum. A first pass over the slices sums squares, a second moves the weight."""
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for _, part in _summed(grad).slices(_height(weight)):
        total += torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32).double().square().sum()
    del part  # or the memory of its slice would live beside that of the next pass
    total = total.float()
    if not torch.isfinite(total):
        return total
    for start, part in _summed(grad).slices(_height(weight)):
        kernels.sgd(
            weight[start : start + len(part)],
            part,
            None,
            None,
            momentum_weight=1.0,
            lr=lr,
            weight_decay=weight_decay,
            key=key,
            shard=_part(weight, start),
        )
    increment_version(weight)
    return total


def _part(weight: Weight, start: int) -> Shard | None:
    """The shard that gives rows from `start` on the noise that they have in the whole weight."""
    if start == 0:
        return None
    return Shard(start * weight.shape[-1], torch.Size(weight.shape), lambda message: None)


def _rows_of(weight: Weight, start: int, stop: int) -> Weight:
    """Some rows of a (1, R, C) weight."""
    if isinstance(weight, Quantized):
        return weight.at((0, slice(start, stop), slice(0, weight.shape[-1]))).view(1, stop - start)
    return weight[:, start:stop]


def _height(weight: Weight) -> int:
    return height_of_slices(weight.shape[-1], weight.device.type)


def height_of_slices(columns: int, device: str) -> int:
    """Rows of a slice, where no part of a compiled update says how many; `device` is a type of device."""
    return max(1, (GPU_SLICE_ELEMENTS if device == "cuda" else SLICE_ELEMENTS) // columns)


def height_of_compiled_slices(rows: int, columns: int, weight_bytes: int, threads: int) -> int:
    """Rows of a slice of the compiled update, as `sbft_slices_begin` cuts a matrix that takes so many bytes."""
    most = max(1, min(64, max(512 << 10, weight_bytes // 200) // (4 * columns)))
    wanted = min(most, max(1, rows * columns // 16384))
    return -(-rows // (8 * wanted)) * 8 * _parts_in_slice(threads)


def _parts_in_slice(threads: int) -> int:
    return min(threads, _MOST_PARTS_IN_SLICE)


def _summed(grad: SlicedGradient) -> SlicedGradient:
    """If the gradient consists of rows alone, add up repeated rows as the backward of a plain embedding does."""
    if grad.product is not None or grad.rows is None:
        return grad
    return SlicedGradient(grad.shape, None, grad.rows.summed())


# Plain torch


def _adafactor(
    weight: Weight,
    grad: SlicedGradient,
    state: tuple[Tensor, Tensor, Tensor],
    weight_square_sum: float | Tensor | None,
    *,
    average_weight: float | Tensor,
    lr: float | Tensor,
    relative_step: bool,
    clip_threshold: float,
    eps: float,
    weight_decay: float,
    key: Key,
) -> tuple[Tensor, float | Tensor | None]:
    grad, (row, column, mass) = _summed(grad), state
    w, (rows, columns), height = weight_matrices(weight), weight.shape, _height(weight)
    row_sum = torch.zeros(1, rows, device=row.device)
    column_sum = torch.zeros(1, columns, device=row.device)
    for start, part in grad.slices(height):
        row_sum[:, start : start + len(part)], of_columns = reference.row_and_column_sums(part[None])
        column_sum += of_columns
    del part
    grad_square_sum = row_sum.sum()
    if not torch.isfinite(grad_square_sum):
        return grad_square_sum, weight_square_sum
    row_factor, column_factor = reference.update_factors(
        row[None], column[None], mass, row_sum, column_sum, average_weight, eps, None
    )

    def parts() -> Iterator[reference.Part]:
        for start, part in grad.slices(height):
            factors = row_factor[:, start : start + len(part)], column_factor
            place = _part(weight, start)
            yield _rows_of(w, start, start + len(part)), reference.factored_update(part[None], *factors), place

    return grad_square_sum, reference.step_and_apply(
        w, parts, weight_square_sum, lr, relative_step, clip_threshold, weight_decay, key, None
    )


# Compiled


def _compiled(
    weight: Weight,
    grad: SlicedGradient,
    state: tuple[Tensor, Tensor, Tensor],
    weight_square_sum: float | None,
    *,
    average_weight: float,
    lr: float,
    relative_step: bool,
    clip_threshold: float,
    eps: float,
    weight_decay: float,
    key: Key,
) -> tuple[float, float | None]:
    memory, (row, column, mass) = stored(weight), state
    compiled = cpu.library(cpu.bits_of(memory))
    assert compiled is not None
    rows, columns = weight.shape
    count = rows * columns
    threads = torch.get_num_threads()
    address, planes = cpu.address_of(memory)
    call = cpu.CALL_MEMORY.from_buffer_copy(
        cpu.CALL.pack(
            *(address, 0, row.data_ptr(), column.data_ptr(), 0, 0, mass.data_ptr(), 0, 0),
            *(1, rows, columns, count, columns, 1, 0, rows, columns, count),
            -1.0 if weight_square_sum is None else weight_square_sum,
            *(average_weight, 0.0, lr, clip_threshold, eps, weight_decay),
            *(grad.dtype == torch.bfloat16, relative_step, threads, key is not None, False, False),
            *(key or (0, 0)),
        )
    )
    parts_and_rows = (ctypes.c_int64 * 2)()
    handle = compiled.sbft_slices_begin(call, parts_and_rows)
    parts, rows_each = parts_and_rows
    try:
        pass_over = _over_rows(grad, parts) if grad.product is None else _over_slices(grad, parts, rows_each, threads)
        pass_over(compiled.sbft_slices_sums, handle)
        grad_square_sum: float = compiled.sbft_slices_factors(handle)
        usable = grad_square_sum - grad_square_sum == 0
        if usable:
            pass_over(compiled.sbft_slices_squares, handle)
            compiled.sbft_slices_choose_step(handle)
            pass_over(compiled.sbft_slices_moves, handle)
    finally:
        new_sum = compiled.sbft_slices_end(handle)
    del planes
    if isinstance(weight, Tensor):
        increment_version(weight)
    if not usable:
        return grad_square_sum, weight_square_sum
    return grad_square_sum, new_sum if new_sum >= 0 else None


_Phase = Callable[..., None]


def _over_slices(grad: SlicedGradient, parts: int, rows_each: int, threads: int) -> Callable[[_Phase, Any], None]:
    """Make a function that runs a phase over slices, each with one part per thread, up to an eighth of the gradient."""
    parts_at_once = _parts_in_slice(threads)

    def run(phase: _Phase, handle: Any) -> None:
        for start, part in grad.slices(rows_each * parts_at_once):
            first = start // rows_each
            phase(handle, first, min(first + parts_at_once, parts), part.data_ptr(), None)

    return run


def _over_rows(grad: SlicedGradient, parts: int) -> Callable[[_Phase, Any], None]:
    """Make a function that runs a phase over the few rows of a gradient."""
    assert grad.rows is not None
    rows = grad.rows.summed()
    values = rows.values.contiguous()
    place = torch.full((grad.shape[0],), -1, dtype=torch.int32)
    place[rows.index] = torch.arange(len(rows.index), dtype=torch.int32)

    def run(phase: _Phase, handle: Any) -> None:
        phase(handle, 0, parts, values.data_ptr(), place.data_ptr())

    return run
