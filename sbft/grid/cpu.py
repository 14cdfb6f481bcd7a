"""Reads and quantizes weights in the CPU's memory with code compiled from cpu.cpp on first use; the same bits as `codes`.

What the compiled code does not cover (tensors that are not contiguous, other dtypes) falls back to `codes`.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sbft.grid import codes
from sbft.grid.codes import Quantized
from sbft.grid.formats import Grid
from sbft.native import compiling
from sbft.native.openmp import load_sharing_openmp

FOLDER = Path(__file__).parent
_HEADERS = [FOLDER / "vectors.h", FOLDER / "blocks.h"]
# -O1 with inlining measured as fast as -O2 and -O3 (the vectors are explicit) and compiles in two thirds of the time.
FLAGS = [
    "-O1", "-finline-functions", "-march=native", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fopenmp", "-shared", "-fPIC",
]  # fmt: skip
ELEMENTS_PER_THREAD = 1 << 15
"""With fewer elements per thread, waking a thread takes longer than it saves."""

PLANES = struct.Struct("@3P3q")  # struct Planes of blocks.h
_DTYPES = (torch.float32, torch.bfloat16)


def build(folder: Path | None = None, flags: Sequence[str] = FLAGS) -> Path:
    """Compile cpu.cpp unless the library exists, and return its path; see `sbft.native.compiling.build`."""
    return compiling.build(FOLDER / "cpu.cpp", flags, facts=facts(), folder=folder)


def facts() -> list[str]:
    """What a library depends on besides its source: the processor and the headers here."""
    return [compiling.processor(), *(header.read_text() for header in _HEADERS)]


def load(path: Path) -> ctypes.CDLL:
    """Load a library that `build` made.

    Raises:
        OSError: if it cannot be loaded.
    """
    compiled = load_sharing_openmp(path)
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    compiled.sbft_dequantize.argtypes = [pointer, count, pointer, number, number]
    compiled.sbft_gather.argtypes = [pointer, count, count, pointer, count, pointer, number, number]
    compiled.sbft_quantize.argtypes = [pointer, pointer, count, number, number]
    compiled.sbft_dequantize.restype = compiled.sbft_quantize.restype = None
    compiled.sbft_gather.restype = count
    return compiled


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, built if necessary; None, after one warning, where it cannot be built."""
    consequence = "weights of 4, 8 and 12 bits are read in plain torch, which is several times slower"
    return compiling.loaded_or_warned(lambda: load(build()), consequence)


def planes(weight: Quantized) -> bytes:
    """`struct Planes` of blocks.h: where the tensors of a weight are."""
    low = 0 if weight.low is None else weight.low.data_ptr()
    grid = weight.grid
    addresses = weight.codes.data_ptr(), low, weight.scales.data_ptr()
    return PLANES.pack(*addresses, weight.block, grid.bits, grid.largest)


def threads_for(count: int) -> int:
    """How many threads to use for `count` elements."""
    return min(torch.get_num_threads(), count // ELEMENTS_PER_THREAD) or 1


def dequantize(weight: Quantized, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None) -> Tensor:
    """See `codes.dequantize`."""
    compiled = library()
    dtype = dtype if out is None else out.dtype
    if (
        compiled is None
        or dtype not in _DTYPES
        or not weight.is_contiguous
        or (out is not None and not out.is_contiguous())
    ):
        return codes.dequantize(weight, dtype, out)
    values = torch.empty(weight.shape, dtype=dtype) if out is None else out
    count = values.numel()
    if count:
        compiled.sbft_dequantize(planes(weight), count, values.data_ptr(), dtype == torch.bfloat16, threads_for(count))
    return values


def dequantize_entries(weight: Quantized, index: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """See `codes.dequantize_entries`."""
    compiled = library()
    if compiled is None or dtype not in _DTYPES or not weight.is_contiguous:
        return codes.dequantize_entries(weight, index, dtype)
    index = index.to(torch.int64).contiguous()
    entries, *rest = weight.shape
    values = torch.empty((*index.shape, *rest), dtype=dtype)
    row = values[(0,) * index.ndim].numel() if index.numel() else 0
    wrong = compiled.sbft_gather(
        planes(weight),
        entries,
        row,
        index.data_ptr(),
        index.numel(),
        values.data_ptr(),
        dtype == torch.bfloat16,
        threads_for(values.numel()),
    )
    if wrong >= 0:
        raise IndexError(f"index {int(index.view(-1)[wrong])} is out of range for {entries} entries")
    return values


def quantize(values: Tensor, grid: Grid) -> Quantized:
    """See `codes.quantize`."""
    compiled = library()
    if compiled is None or values.dtype not in _DTYPES or not values.is_contiguous():
        return codes.quantize(values, grid)
    made = codes.empty(grid, values.shape)
    count = values.numel()
    compiled.sbft_quantize(planes(made), values.data_ptr(), count, values.dtype == torch.bfloat16, threads_for(count))
    return made
