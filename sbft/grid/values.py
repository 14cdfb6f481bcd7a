"""Reads and quantizes weights on a grid with the fastest code for their device; all give the same bits.

`SBFT_KERNELS=reference` in the environment forces plain torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from sbft.grid import codes, cpu
from sbft.grid.codes import Quantized
from sbft.grid.formats import Grid
from sbft.native.device_type import device_type


def quantize(values: Tensor, grid: Grid) -> Quantized:
    """Store a tensor on a grid; see `codes.quantize`."""
    return _backend(values.device).quantize(values, grid)


def dequantize(weight: Quantized, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None) -> Tensor:
    """The values of a weight; see `codes.dequantize`. For part of the rows: `dequantize(weight.rows(start, stop))`."""
    if _only_measures(weight.codes):
        return torch.empty(weight.shape, dtype=dtype, device="meta") if out is None else out
    return _backend(weight.codes.device).dequantize(weight, dtype, out)


def dequantize_entries(weight: Quantized, index: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The values of some entries of a weight, such as the embeddings of tokens; see `codes.dequantize_entries`."""
    if _only_measures(weight.codes):
        return torch.empty((*index.shape, *weight.shape[1:]), dtype=dtype, device="meta")
    return _backend(weight.codes.device).dequantize_entries(weight, index, dtype)


def _only_measures(codes: Tensor) -> bool:
    """Whether codes are on the meta device and stand for a device whose compiled code allocates nothing but its result."""
    return codes.device.type == "meta" and device_type(codes) in ("cpu", "cuda", "meta")


def _backend(device: torch.device) -> ModuleType:
    if os.environ.get("SBFT_KERNELS", "") == "reference":
        return codes
    if device.type == "cpu":
        return cpu
    return _cuda() if device.type == "cuda" else codes


@functools.cache
def _cuda() -> ModuleType:
    """The Triton programs, or plain torch where Triton is not installed, of which `sbft.optim.kernels` warns."""
    if importlib.util.find_spec("triton") is None:
        return codes
    return importlib.import_module("sbft.grid.cuda")
