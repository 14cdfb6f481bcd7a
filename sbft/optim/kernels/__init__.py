"""The update of one parameter on three backends: `reference` (torch), `cpu` (compiled C++), `cuda` (Triton).

All have the functions of `reference`, with the same arguments. The weight's device decides which is used;
`SBFT_KERNELS=reference` in the environment forces the reference.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType
from typing import Any

import torch

from sbft.optim.kernels import cpu, reference


def backend_for(device: torch.device) -> ModuleType:
    """The module whose functions update a parameter on `device`.

    Raises:
        ValueError: if `SBFT_KERNELS` has an unknown value.
    """
    choice = os.environ.get("SBFT_KERNELS", "")
    if choice not in ("", "reference"):
        raise ValueError(f"SBFT_KERNELS={choice!r} is not known: leave it unset, or set it to 'reference'")
    if choice == "reference":
        return reference
    if device.type == "cpu":
        return cpu
    return _cuda() if device.type == "cuda" else reference


def can_wait(kernels: ModuleType) -> bool:
    """Whether updates by a backend (what `backend_for` returned) may wait for each other; elsewhere a launch costs nothing."""
    return kernels.__name__ == _CUDA


def waiting_updates(device: torch.device, most_bytes: int) -> Any:
    """What lets updates by a backend wait for each other, if it can (`can_wait`).

    Args:
        device: of the weights.
        most_bytes: limit of what waits; see `cuda_waiting.WaitingUpdates`.
    """
    return importlib.import_module("sbft.optim.kernels.cuda_waiting").WaitingUpdates(device, most_bytes)


_CUDA = "sbft.optim.kernels.cuda"


@functools.cache
def _cuda() -> ModuleType:
    """The Triton kernels; after one warning the reference, if Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        warnings.warn(
            "sbft's CUDA kernels need the package triton, which is not installed, so the optimizer step runs in plain torch, "
            "which is many times slower; install it with: pip install triton",
            stacklevel=2,
        )
        return reference
    return importlib.import_module(_CUDA)
