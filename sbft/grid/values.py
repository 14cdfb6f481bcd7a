"""Values of weights on a grid, by the fastest code that their device has; all give the same bits.

`SBFT_KERNELS=reference` in the environment forces plain torch.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from sbft.grid import codes, cpu
from sbft.grid.codes import Quantized
from sbft.grid.formats import Grid


def quantize(values: Tensor, grid: Grid) -> Quantized:
    """Store a tensor on a grid; see `codes.quantize`."""
    return _backend(values.device).quantize(values, grid)


def dequantize(weight: Quantized, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None) -> Tensor:
    """The values of a weight; see `codes.dequantize`. For part of the rows: `dequantize(weight.rows(start, stop))`."""
    return _backend(weight.codes.device).dequantize(weight, dtype, out)


def dequantize_entries(weight: Quantized, index: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The values of some entries of a weight, such as the embeddings of tokens; see `codes.dequantize_entries`."""
    return _backend(weight.codes.device).dequantize_entries(weight, index, dtype)


def _backend(device: torch.device) -> ModuleType:
    if device.type == "cpu" and os.environ.get("SBFT_KERNELS", "") != "reference":
        return cpu
    return codes
