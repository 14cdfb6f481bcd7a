"""Reading weights on CUDA devices, in one launch of a Triton program; the same bits as `codes`.

What the program does not cover (tensors that are not contiguous, other dtypes) falls back to `codes`. Quantizing, which is done
once when a model is put on a grid, always uses `codes`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sbft.grid import codes, cuda_programs
from sbft.grid.codes import Quantized, quantize

__all__ = ["dequantize", "dequantize_entries", "quantize"]

BLOCK = 2048
"""Elements that one program writes."""

_DTYPES = (torch.float32, torch.bfloat16)


def dequantize(weight: Quantized, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None) -> Tensor:
    """See `codes.dequantize`."""
    dtype = dtype if out is None else out.dtype
    if dtype not in _DTYPES or not weight.is_contiguous or (out is not None and not out.is_contiguous()):
        return codes.dequantize(weight, dtype, out)
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device) if out is None else out
    count = values.numel()
    if count:
        low = weight.codes if weight.low is None else weight.low  # which is not read
        with torch.cuda.device_of(values):  # changes nothing where the interpreter runs on a CPU
            cuda_programs.dequantize[(triton.cdiv(count, BLOCK),)](
                weight.codes, low, weight.scales, values, count,
                BITS=weight.grid.bits, GRID_BLOCK=weight.block, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
    return values


def dequantize_entries(weight: Quantized, index: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """See `codes.dequantize_entries`; an index that is out of range fails on the device, as torch's do."""
    return dequantize(weight.gather(index), dtype)
