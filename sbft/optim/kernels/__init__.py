"""The update of one parameter on three backends: `reference` (torch), `cpu` (compiled C++), `cuda` (Triton).

All have the functions of `reference` with the same arguments. The tensor's device chooses; `SBFT_KERNELS=reference` in the
environment forces the reference.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch

from sbft.optim.kernels import cpu, reference


def backend_for(device: torch.device) -> ModuleType:
    """The module whose functions update a parameter on `device`.

    Raises:
        ValueError: if `SBFT_KERNELS` holds a word it does not know.
    """
    choice = os.environ.get("SBFT_KERNELS", "")
    if choice not in ("", "reference"):
        raise ValueError(f"SBFT_KERNELS={choice!r} is not known: leave it unset, or set it to 'reference'")
    if choice == "reference":
        return reference
    if device.type == "cpu":
        return cpu
    return reference
