"""Signs that a run will go wrong: the processor it runs on."""

from __future__ import annotations

import torch

from sbft.native.memory import type_of
from sbft.planning.check.finding import Finding
from sbft.recipe.methods import METHODS
from sbft.runs.prepare import Prepared


def slow_bfloat16(prepared: Prepared) -> Finding | None:
    """bfloat16 on a CPU for which oneDNN has no bfloat16 kernels, so that torch multiplies one number at a time."""
    recipe = prepared.recipe
    quantized = METHODS[recipe.method].quantization is not None  # it computes in another dtype
    if recipe.dtype != "bfloat16" or quantized or type_of() != "cpu" or multiplies_bfloat16():
        return None
    return Finding(
        "slow-bfloat16",
        "warning",
        "bfloat16 is slow on this processor",
        "oneDNN cannot multiply bfloat16 on it (on x86 this requires AVX-512), so torch multiplies one number at a time. "
        "In float32, a step of SmolLM2-135M took a sixteenth of the time, and weights take twice the memory "
        "(benchmarks/README.md). The memory that bfloat16 takes here beside tensors is not predicted.",
        "--set dtype=float32",
    )


def multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this CPU, with the instruction sets it is allowed to use."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


PROCESSOR_CHECKS = (slow_bfloat16,)
