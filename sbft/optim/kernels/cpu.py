"""The updates on a CPU, compiled from cpu.cpp on first use and called without copies; arguments as in `reference`.

The library is built by the machine's C++ compiler into the user's cache. Its name is a hash of the source, the compiler's
version, the flags and the processor, so that it is built once and never used elsewhere. Updates that the compiled
code does not cover (weights that are not contiguous, gradients of another dtype) fall back to the reference.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sbft.grid import cpu as grid
from sbft.grid.codes import Quantized
from sbft.native import compiling
from sbft.native.openmp import load_sharing_openmp
from sbft.optim.kernels.blocks import Key, Weight, matrices, stored
from sbft.optim.kernels.fallback import or_reference
from sbft.optim.sharding import Shard
from sbft.optim.vocabulary import SlicedGradient

_SOURCE = Path(__file__).with_name("cpu.cpp")
_LARGEST_BLOCK = 128  # of a grid
_DTYPES = (torch.float32, torch.bfloat16)

# The argument of every compiled function, `struct Call` in cpu.cpp. Packed, not a ctypes.Structure: setting its 34 fields one
# by one takes longer than updating the weight of a layer norm.
CALL = struct.Struct("@9P10q7d6i2I")
CALL_MEMORY = ctypes.c_char * CALL.size
_PLANES_MEMORY = ctypes.c_char * grid.PLANES.size
_WEIGHT_SUM = struct.Struct("@d")
_WEIGHT_SUM_OFFSET = struct.calcsize("@9P10q")
_SUM = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


@functools.cache
def library(bits: int = 0) -> ctypes.CDLL | None:
    """The compiled library, built if necessary; None, after one warning, where it cannot be built.

    Args:
        bits: of the grid that the weights are on; 0 for float32 and bfloat16.
    """
    consequence = "the optimizer step runs in plain torch, which is about ten times slower"
    return compiling.loaded_or_warned(lambda: load(build(bits)), consequence)


def load(path: Path) -> ctypes.CDLL:
    """Load a library that `build` made.

    Raises:
        OSError: if it cannot be loaded.
    """
    compiled = load_sharing_openmp(path)
    for name in ("sbft_adafactor_factored", "sbft_adafactor_full", "sbft_adamw", "sbft_sgd"):
        function = getattr(compiled, name)
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_double
    compiled.sbft_noise.argtypes = [
        ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    compiled.sbft_noise.restype = None
    handle, part, pointer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p
    compiled.sbft_slices_begin.argtypes, compiled.sbft_slices_begin.restype = [pointer, pointer], handle
    for name in ("sums", "squares", "moves"):
        function = getattr(compiled, f"sbft_slices_{name}")
        function.argtypes, function.restype = [handle, part, part, pointer, pointer], None
    for name, result in (("factors", ctypes.c_double), ("choose_step", None), ("end", ctypes.c_double)):
        function = getattr(compiled, f"sbft_slices_{name}")
        function.argtypes, function.restype = [handle], result
    return compiled


def build(bits: int = 0, folder: Path | None = None, flags: Sequence[str] = grid.FLAGS) -> Path:
    """Compile cpu.cpp unless it is in the cache, and return the library's path; see `sbft.native.compiling.build`."""
    defined = [f"-DGRID_BITS={bits}"] if bits else []
    return compiling.build(_SOURCE, [*flags, *defined], facts=grid.facts(), folder=folder)


def covers(weight: Weight, grad: Tensor | SlicedGradient, shard: Shard | None) -> bool:
    """Whether the compiled code can do this update; otherwise the reference does."""
    weight = stored(weight)
    if isinstance(weight, Quantized):
        whole_groups = shard is None or not shard.columns_split
        usual = weight.is_contiguous and whole_groups and weight.block <= _LARGEST_BLOCK and grad.dtype in _DTYPES
    else:
        usual = weight.is_contiguous() and grad.dtype == weight.dtype
    # It sums over all other ranks, not separately over those with other rows and those with other columns.
    one_cut = shard is None or shard.over_rows is None
    return usual and one_cut and weight.numel() > 0 and library(bits_of(weight)) is not None


def bits_of(weight: Weight) -> int:
    """Bits of a weight's grid; 0 for float32 and bfloat16."""
    return weight.grid.bits if isinstance(weight, Quantized) else 0


class _SumOverRanks:
    """`Shard.sum` as a function that compiled code may call. `check` raises the error of a call that failed."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._error: BaseException | None = None
        self._function = _SUM(self._sum)  # must live as long as it may be called
        self.address = ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def _sum(self, address: int, count: int) -> None:
        memory = (ctypes.c_double * count).from_address(address)
        try:
            self._shard.all_reduce(torch.frombuffer(memory, dtype=torch.float64))
        except BaseException as error:  # cannot be raised through compiled code
            self._error = error
            memory[:] = [math.nan] * count

    def check(self) -> None:
        del self._function  # breaks the cycle with this object
        if self._error is not None:
            raise self._error


def address_of(memory: Weight) -> tuple[int, object]:
    """The address of a weight for compiled code, and an object that has to stay alive while it is in use."""
    if isinstance(memory, Quantized):
        planes = _PLANES_MEMORY.from_buffer_copy(grid.planes(memory))
        return ctypes.addressof(planes), planes
    return memory.data_ptr(), None


State = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Tensors of a state in the order of `struct Call`: row, column, first and second moment, mass, mass of the second."""


def _run(
    function: str,
    weight: Weight,
    grad: Tensor,
    state: State,
    key: Key,
    shard: Shard | None,
    *,
    weight_square_sum: float | None = None,
    average_weight: float = 0.0,
    first_weight: float = 0.0,
    lr: float,
    clip_threshold: float = 1.0,
    eps: float = 0.0,
    weight_decay: float,
    relative_step: bool = False,
) -> tuple[float, float | None]:
    """Call a compiled function; returns the sum of the squared gradient, and of the squared new weights if it was computed."""
    memory = stored(weight)
    if grad.ndim <= 2 and grad.is_contiguous():
        rows, columns = grad.shape if grad.ndim == 2 else (1, grad.numel())
        geometry = (1, rows, columns, rows * columns, columns, 1)
    else:
        view = matrices(grad)
        stack_stride, row_stride, column_stride = view.stride()
        geometry = (*view.shape, stack_stride, row_stride, 1 if view.shape[2] == 1 else column_stride)
    count = weight.numel()
    sums, whole, split = None, (0, geometry[1], geometry[2], count), (False, False)
    if shard is not None:
        sums, split = _SumOverRanks(shard), (shard.rows_split, shard.columns_split)
        rows, columns = shard.shape[0] if split[0] else geometry[1], shard.shape[-1] if split[1] else geometry[2]
        whole = (shard.offset, rows, columns, shard.count)
    address, _planes = address_of(memory)
    call = CALL_MEMORY.from_buffer_copy(
        CALL.pack(
            address,
            grad.data_ptr(),
            *[0 if tensor is None else tensor.data_ptr() for tensor in state],
            0 if sums is None else sums.address,
            *geometry,
            *whole,
            -1.0 if weight_square_sum is None else weight_square_sum,
            *(average_weight, first_weight, lr, clip_threshold, eps, weight_decay),
            *(grad.dtype == torch.bfloat16, relative_step, grid.threads_for(count), key is not None, *split),
            *(key or (0, 0)),
        )
    )
    grad_square_sum: float = getattr(library(bits_of(memory)), function)(call)
    if sums is not None:
        sums.check()
    if isinstance(weight, Tensor):
        increment_version(weight)
    (new_sum,) = _WEIGHT_SUM.unpack_from(call, _WEIGHT_SUM_OFFSET)
    return grad_square_sum, new_sum if new_sum >= 0 else None


@or_reference(covers)
def adafactor_factored(
    weight: Weight,
    grad: Tensor,
    row: Tensor,
    column: Tensor,
    mass: Tensor,
    weight_square_sum: float | None,
    *,
    key: Key,
    shard: Shard | None = None,
    **settings: Any,
) -> tuple[float | Tensor, float | Tensor | None]:
    """See `reference.adafactor_factored`."""
    state = row, column, None, None, mass, None
    return _run(
        "sbft_adafactor_factored", weight, grad, state, key, shard, weight_square_sum=weight_square_sum, **settings
    )


@or_reference(covers)
def adafactor_full(
    weight: Weight,
    grad: Tensor,
    second_moment: Tensor,
    mass: Tensor,
    weight_square_sum: float | None,
    *,
    key: Key,
    shard: Shard | None = None,
    **settings: Any,
) -> tuple[float | Tensor, float | Tensor | None]:
    """See `reference.adafactor_full`."""
    state = None, None, None, second_moment, mass, None
    return _run("sbft_adafactor_full", weight, grad, state, key, shard, weight_square_sum=weight_square_sum, **settings)


@or_reference(covers)
def adamw(
    weight: Weight,
    grad: Tensor,
    first_moment: Tensor | None,
    second_moment: Tensor,
    first_mass: Tensor,
    second_mass: Tensor,
    *,
    second_weight: float,
    key: Key,
    shard: Shard | None = None,
    **settings: Any,
) -> float | Tensor:
    """See `reference.adamw`."""
    state = None, None, first_moment, second_moment, first_mass, second_mass
    return _run("sbft_adamw", weight, grad, state, key, shard, average_weight=second_weight, **settings)[0]


@or_reference(covers)
def sgd(
    weight: Weight,
    grad: Tensor,
    momentum: Tensor | None,
    mass: Tensor | None,
    *,
    momentum_weight: float,
    key: Key,
    shard: Shard | None = None,
    **settings: Any,
) -> float | Tensor:
    """See `reference.sgd`."""
    state = None, None, momentum, None, mass, None
    return _run("sbft_sgd", weight, grad, state, key, shard, average_weight=momentum_weight, **settings)[0]
