"""Memory that one update takes beside its tensors. It is measured in a process of its own: a long-lived process has a heap
full of gaps, whose pages are given back and taken again.

`python -m tests.measure` prints a JSON object: bytes by backend and shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from sbft.native.memory import PeakMemory
from sbft.optim.kernels import cpu, reference
from sbft.rounding import noise_key

SHAPES: list[tuple[int, ...]] = [(2048, 2048), (20_000, 300), (300, 20_000), (4_000_000,)]
BACKENDS = {"cpu": cpu, "reference": reference}


def update_bytes(backend: str, shape: tuple[int, ...]) -> int:
    """Rise of resident memory during an Adafactor update of a bfloat16 weight, C++ allocations included; exact to 0.2 MB."""
    kernels: Any = BACKENDS[backend]
    weight, grad = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    settings = {"average_weight": 0.3, "lr": 1e-2, "relative_step": True, "clip_threshold": 1.0, "eps": 1e-30}
    settings |= {"weight_decay": 0.1, "key": noise_key(1, 2, 3)}

    def run() -> None:
        if len(shape) == 1:
            kernels.adafactor_full(weight, grad, *state, None, **settings)
        else:
            kernels.adafactor_factored(weight, grad, *state, None, **settings)

    averages = [shape] if len(shape) == 1 else [shape[:1], shape[1:]]
    state = [torch.zeros(size) for size in (*averages, ())]
    run()
    return min(allocated_bytes(run) for _ in range(3))  # malloc's own overhead differs each time


def allocated_bytes(call: Callable[[], Any]) -> int:
    """Rise of this process's resident memory during `call`.

    `PeakMemory` first makes malloc return the memory it keeps: otherwise, reuse of that memory would go unnoticed.
    """
    with PeakMemory() as memory:
        call()
    return memory.peak_bytes - memory.baseline_bytes


if __name__ == "__main__":
    print(json.dumps({name: {str(shape): update_bytes(name, shape) for shape in SHAPES} for name in BACKENDS}))
