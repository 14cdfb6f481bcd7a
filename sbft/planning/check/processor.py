"""Signs of a run that goes wrong which lie in the processor it runs on."""

from __future__ import annotations

import torch

from sbft.native.memory import type_of
from sbft.planning.check.finding import Finding
from sbft.recipe.methods import METHODS
from sbft.runs.prepare import Prepared


def slow_bfloat16(prepared: Prepared) -> Finding | None:
    """bfloat16 on a CPU for which oneDNN has no code that multiplies it; then torch does, a number at a time."""
    recipe = prepared.recipe
    quantized = METHODS[recipe.method].quantization is not None  # of which only the storage is in question here
    if recipe.dtype != "bfloat16" or quantized or type_of() != "cpu" or multiplies_bfloat16():
        return None
    return Finding(
        "slow-bfloat16",
        "warning",
        "bfloat16 is slow on this processor",
        "It has no instructions by which oneDNN could multiply bfloat16 (on x86 that takes AVX-512), so that torch "
        "does it one number at a time. In float32 a step of SmolLM2-135M took a sixteenth of the time; weights take twice the "
        "memory (benchmarks/README.md). What bfloat16 takes beside tensors there is not predicted.",
        "--set dtype=float32",
    )


def multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this machine's CPU, with the instructions that it is allowed."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


PROCESSOR_CHECKS = (slow_bfloat16,)
