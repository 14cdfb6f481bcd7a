"""The memory that a run on this machine may take."""

from __future__ import annotations

import torch

from sbft.native.memory import available_bytes

_OF_WHAT_IS_FREE = 0.9
"""The rest is a margin: other programs may take it meanwhile, and a process that runs out is killed without a message."""


def usable_bytes(device: torch.device) -> int | None:
    """The highest resident memory that this process may reach; None on CUDA.

    On CUDA, running out of memory raises an error that can be handled, so it need not be avoided.
    """
    if device.type == "cuda":
        return None
    return round(_OF_WHAT_IS_FREE * available_bytes(device))
